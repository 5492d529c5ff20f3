"""The queue's file: nothing is lost, nothing is made twice, and a worker that was given up changes nothing."""

from __future__ import annotations

import threading
import time

import pytest

from sgm.errors import SgmError
from sgm.files import readable
from sgm.serve.desk import Forecast
from sgm.serve.jobs import COMPLETED, EXPIRED, FAILED, QUEUED, RUNNING, ServeError
from sgm.serve.maker import Maker
from sgm.serve.store import GAVE_UP, MOST_ATTEMPTS, JobStore, KeyReusedError, QueueFullError, new_id
from sgm.serve.views import player
from tests.serve_tiny import Painted, Report, origin, paint, request

ORIGIN = origin()


@pytest.fixture
def store(tmp_path):
    store = JobStore(tmp_path / "out")
    yield store
    store.close()


def create(store, prompt="a star", origin=ORIGIN, most=100):
    return store.create(new_id(), request(prompt), origin, most)


def test_jobs_are_made_in_their_order_and_survive_the_process(store):
    made = [create(store, f"{k}", origin(f"{k}"))[0] for k in range(3)]
    assert [store.claim("w").id for _ in range(2)] == [job.id for job in made[:2]]
    assert store.finish(made[0].id, "w")
    other = JobStore(store.folder)  # another process, or the next one
    assert [other.get(job.id).state for job in made] == [COMPLETED, RUNNING, QUEUED]
    assert other.get(made[1].id).request == request("1")
    other.sweep()
    assert [other.get(job.id).state for job in made] == [COMPLETED, QUEUED, QUEUED]
    assert other.claim("w2").id == made[1].id  # in its old place
    other.close()


def test_a_repeat_finds_the_job_of_the_first_sending(store):
    first, new = create(store)
    assert new
    assert create(store, origin=origin(repeats=1)) == (first, False)
    assert create(store, origin=origin(repeats=2)) == (first, False)
    assert create(store, origin=origin("another", repeats=1))[1]  # whose first sending never arrived
    second, new = create(store)
    assert new and second.id != first.id  # the same twice is no repeat: two clips with seeds of their own


def test_a_repeat_takes_rather_what_was_not_answered_and_never_what_a_client_knows(store):
    jobs = [create(store)[0] for _ in range(3)]
    store.get(jobs[0].id, known=True)
    store.answered(jobs[1].id)
    assert create(store, origin=origin(repeats=1))[0] == jobs[2]
    store.get(jobs[2].id, known=True)
    assert create(store, origin=origin(repeats=1))[0] == jobs[1]
    store.get(jobs[1].id, known=True)
    assert create(store, origin=origin(repeats=1))[1]


def test_a_first_sending_that_its_repeat_has_overtaken_makes_nothing(store):
    arrived = time.time() - 60
    repeat, new = create(store, origin=origin(repeats=1, arrived=time.time()))
    assert new
    assert create(store, origin=origin(arrived=arrived)) == (repeat, False)
    assert create(store, origin=origin(arrived=time.time() + 1))[1]


def test_an_idempotency_key_is_exact(store):
    first, _ = create(store, origin=origin(key="k"))
    assert create(store, origin=origin(key="k")) == (first, False)
    with pytest.raises(KeyReusedError, match="another request"):
        create(store, "a circle", origin("g", key="k"))
    store.claim("w")
    store.delete(first.id)  # its files go with its next step
    again, new = create(store, origin=origin(key="k"))
    assert new and store.claim("w").id == again.id and store.finish(again.id, "w")
    assert store.expire(time.time() + 1) == [again.id]
    assert create(store, origin=origin(key="k"))[1]


def test_a_full_queue_takes_nothing_but_repeats(store):
    first, _ = create(store, most=1)
    with pytest.raises(QueueFullError, match="1 videos wait"):
        create(store, origin=origin("g"), most=1)
    assert create(store, origin=origin(repeats=1), most=1) == (first, False)
    store.claim("w")
    assert create(store, origin=origin("g"), most=1)[1]


def test_a_worker_that_was_given_up_changes_nothing(store):
    job, _ = create(store)
    store.claim("old")
    store.requeue("old")
    assert store.claim("new").attempts == 2
    assert not store.step(job.id, "old", 1, 2) and not store.finish(job.id, "old", "error")
    assert store.step(job.id, "new", 1, 2)
    assert (store.get(job.id).state, store.get(job.id).progress) == (RUNNING, 50)


def test_a_job_over_which_workers_end_is_given_up(store):
    job, _ = create(store)
    for k in range(MOST_ATTEMPTS):
        assert store.claim(f"w{k}").id == job.id
        store.requeue(f"w{k}")
    assert (store.get(job.id).state, store.get(job.id).error) == (FAILED, GAVE_UP)
    assert store.claim("w") is None


def test_a_job_survives_any_number_of_ends_of_the_server(store):
    job, _ = create(store)
    for k in range(2 * MOST_ATTEMPTS):
        assert store.claim(f"w{k}").attempts == 1
        store.sweep()
    assert store.get(job.id).state == QUEUED


def test_pages_follow_each_other(store):
    jobs = [create(store, f"{k}", origin(f"{k}"))[0] for k in range(5)]
    page, more = store.page(2)
    assert (page, more) == (jobs[:2:-1], True)
    page, more = store.page(3, page[-1])
    assert (page, more) == (jobs[2::-1], False)
    assert store.page(2, jobs[1], ascending=True) == (jobs[2:4], True)


def test_deleting_removes_files_and_stops_what_runs(store):
    waiting, _ = create(store, origin=origin("1"))
    folder = store.files(waiting.id).folder
    folder.mkdir()
    assert store.delete(waiting.id) and not folder.exists() and store.get(waiting.id) is None
    running, _ = create(store, origin=origin("2"))
    assert Maker(store, "w", lambda job, folder, on_step: deleted_between(store, running, on_step)).make_next()
    assert store.get(running.id) is None and not store.files(running.id).folder.exists()
    assert not store.delete(running.id)
    assert store.totals()["deleted"] == 2 and store.totals()["completed"] == 0


def deleted_between(store, job, on_step):
    on_step(Report(1, 3))
    store.delete(job.id)
    on_step(Report(2, 3))
    raise AssertionError("it goes on")


def test_expired_videos_are_gone_and_remembered(store):
    job, _ = create(store)
    assert Maker(store, "w", paint).make_next()
    assert store.files(job.id).video.is_file()
    assert store.expire(time.time() - 60) == []
    assert store.expire(time.time() + 1) == [job.id]
    assert store.get(job.id).state == EXPIRED and not store.files(job.id).folder.exists()
    assert store.page(10) == ([], False)


def test_a_sweep_removes_folders_without_a_job_and_nothing_else(store):
    (store.folder / new_id()).mkdir()
    (store.folder / "mine").mkdir()
    store.sweep()
    assert [path.name for path in store.folder.iterdir() if path.is_dir()] == ["mine"]


def test_ids_lead_out_of_no_folder(store):
    for name in ("..", "video_", f"{new_id()}/..", f"../{new_id()}"):
        with pytest.raises(ServeError):
            store.files(name)


def test_many_threads_lose_none_and_make_none_twice(store):
    def client(k):
        for n in range(10):
            create(store, f"{k} {n}", origin(f"{k} {n}"), 1000)

    claimed, threads = [], [threading.Thread(target=client, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    other = JobStore(store.folder)
    while len(claimed) < 80:
        if job := other.claim("w"):
            claimed.append(job.request.prompt)
    for thread in threads:
        thread.join()
    assert len(set(claimed)) == 80 and other.claim("w") is None
    other.close()


def test_a_file_that_is_none_of_ours_is_one_error(tmp_path):
    (tmp_path / "jobs.sqlite3").write_text("x" * 4096)
    with pytest.raises(ServeError, match="Move it away"):
        JobStore(tmp_path)


def test_what_is_at_fault_ends_in_the_job_and_bugs_end_the_worker(store):
    def refuses(*_):
        raise SgmError("no positions for this size")

    bad, _ = create(store, origin=origin("1"))
    assert Maker(store, "w", refuses).make_next()
    assert (store.get(bad.id).state, store.get(bad.id).error) == (FAILED, "no positions for this size")
    bug, _ = create(store, origin=origin("2"))
    with pytest.raises(TypeError):
        Maker(store, "w", lambda *_: len(None)).make_next()
    assert store.get(bug.id).state == FAILED and "TypeError" in store.get(bug.id).error


def test_previews_end_where_memory_does(store):
    class Large(Report):
        @staticmethod
        def preview():
            raise MemoryError(readable(1 << 40))

    def clip(asked, folder, on_step):
        on_step(Large(1, 3))
        return paint(asked, folder, lambda _: None)

    job, _ = create(store)
    maker = Maker(store, "w", clip, previews=True, too_large=(MemoryError,))
    assert maker.make_next() and store.get(job.id).state == COMPLETED and not maker.previews


def test_what_was_unusual_stands_beneath_the_video(store):
    def clip(asked, folder, on_step):
        warnings = (f"the model does not know {asked.prompt}",)
        return Painted(paint(asked, folder, on_step).frames, warnings if asked.prompt == "<fox>" else ())

    for prompt in ("<fox>", "star"):
        job, _ = create(store, prompt, origin(prompt))
        assert Maker(store, "w", clip).make_next()
        shown = player(store.get(job.id), store.files(job.id), Forecast([], [], 1, 0.0))
        assert ("the model does not know &lt;fox&gt;" in shown) == (prompt == "<fox>")


def test_a_preview_is_there_while_the_video_is_not(store):
    seen = []

    def clip(asked, folder, on_step):
        on_step(Report(1, 3))
        seen.append((folder / "preview.jpg").read_bytes()[:2])
        return paint(asked, folder, lambda _: None)

    job, _ = create(store)
    assert Maker(store, "w", clip, previews=True).make_next()
    files = store.files(job.id)
    assert seen == [b"\xff\xd8"] and not files.preview.exists()
    assert files.thumbnail.read_bytes()[8:12] == b"WEBP" and files.spritesheet.read_bytes()[:2] == b"\xff\xd8"
