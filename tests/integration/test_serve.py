"""The server as it is: its process, its worker, the client that OpenAI publishes, and a browser. On a tiny model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import httpx2
import openai
import pytest

from sgm.data.video_io import probe
from sgm.places import PROJECT
from sgm.serve.parameters import SCALES, STRENGTHS
from tests.browser import Browser, find_browser
from tests.sampling_tiny import REPO, configuration, environment, write_release, write_yaml
from tests.serve_tiny import Server, is_alive, wait_for

warnings.filterwarnings("ignore", message="The Sora API")
SIZES = ((1280, 800), (420, 800))
CAPTION = "A red star drifts over snow."


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    release = write_release(tmp_path_factory.mktemp("release"))
    content = configuration(release, sampling_num_frames=3)
    content["model"]["network_config"]["params"]["num_frames"] = 9  # positions for three latent frames
    return write_yaml(release / "tiny_infer.yaml", content)


class LanguageModel(BaseHTTPRequestHandler):
    """Writes every prompt out in the same words."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"choices": [{"message": {"role": "assistant", "content": CAPTION}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def server(config, tmp_path_factory):
    """The page's server, beside a language model for the refinement of prompts."""
    refines = ThreadingHTTPServer(("127.0.0.1", 0), LanguageModel)
    threading.Thread(target=refines.serve_forever, daemon=True).start()
    server = Server(tmp_path_factory.mktemp("served"), config, "--max-clip", "3", "--max-steps", "5000")
    server.start(environ={"OPENAI_BASE_URL": f"http://127.0.0.1:{refines.server_port}/v1", "no_proxy": "127.0.0.1"})
    yield server
    if server.process.poll() is None:
        server.stop()
    refines.shutdown()
    refines.server_close()


def client_of(server: Server, **options) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", **options)


def test_the_client_of_openai_works_with_base_url_alone(server, tmp_path):
    client = client_of(server)
    assert [model.id for model in client.models.list()] == ["tiny"]
    asked = {"prompt": "a star", "size": "32x16", "seconds": "1", "extra_body": {"seed": 7, "steps": 3}}
    video = client.videos.create_and_poll(**asked, poll_interval_ms=100)
    assert (video.status, video.progress, video.seconds, video.size) == ("completed", 100, "1", "32x16")
    file = tmp_path / "star.mp4"
    client.videos.download_content(video.id).write_to_file(file)
    found = probe(file)
    assert (found.frames, found.width, found.height) == (9, 32, 16)
    assert client.videos.download_content(video.id, variant="thumbnail").read()[8:12] == b"WEBP"
    record = httpx.get(f"{server.address}/v1/videos/{video.id}/content?variant=record").json()
    assert (record["prompt"], record["seed"], record["num_steps"], record["latent_frames"]) == ("a star", 7, 3, 3)
    again = client.videos.create_and_poll(**asked, poll_interval_ms=100)
    assert client.videos.download_content(again.id).read() == file.read_bytes()
    start = client.videos.create_and_poll(prompt="a star", input_reference=file.read_bytes(), poll_interval_ms=100)
    assert start.status == "completed", start.error
    cut = client.videos.create_and_poll(prompt="x", input_reference=file.read_bytes()[:600], poll_interval_ms=100)
    assert cut.status == "failed" and "start.mp4" in cut.error.message and str(server.folder) not in cut.error.message
    assert client.videos.delete(cut.id).deleted
    assert [v.id for v in client.videos.list(limit=1)] == [start.id, again.id, video.id]  # three pages
    with pytest.raises(openai.BadRequestError, match="has tiny") as error:
        client.videos.create(prompt="a star", model="sora-2")
    assert error.value.code == "model_not_found" and error.value.param == "model"
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)
    assert not (server.folder / video.id).exists()


def test_the_transcript_in_the_docs_holds(server, tmp_path, monkeypatch, capsys):
    """What docs/serving.md prints, but for the model's name and size."""
    page = (REPO / "docs" / "serving.md").read_text(encoding="utf-8")
    code, said = re.findall(r"^```(?:python)?\n((?:import openai|\['demo'\]).*?)^```", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("http://127.0.0.1:7860", server.address).replace('"demo"', '"tiny"'), {})
    expected = said.replace("demo", "tiny").replace("192x128 6", "32x16 1").replace("192x128", "32x16")
    assert capsys.readouterr().out == expected
    assert probe(tmp_path / "star.mp4").frames == 9


def test_deleting_stops_between_steps(server):
    client = client_of(server)
    long = client.videos.create(prompt="long", extra_body={"steps": 900})
    wait_for(lambda: client.videos.retrieve(long.id).progress > 0)
    next_one = client.videos.create(prompt="next")
    began = time.monotonic()
    client.videos.delete(long.id)
    assert client.videos.poll(next_one.id, poll_interval_ms=50).status == "completed"
    assert time.monotonic() - began < 10
    assert not (server.folder / long.id).exists()


def test_a_slow_answer_makes_one_clip(server):
    """The client gives up on its answer and sends the same again, as it does by itself."""
    lost: list[httpx.Response] = []

    def lose_first(response: httpx.Response) -> None:
        if response.request.method == "POST" and not lost:
            lost.append(response)
            raise httpx2.ReadTimeout("lost on the way")

    client = client_of(server, http_client=openai.DefaultHttpxClient(event_hooks={"response": [lose_first]}))
    before = created(server)
    video = client.videos.create(prompt="once")
    assert lost and client.videos.poll(video.id, poll_interval_ms=50).status == "completed"
    assert created(server) == before + 1


def created(server: Server) -> float:
    text = httpx.get(f"{server.address}/metrics").text
    return next(
        float(line.split()[1]) for line in text.splitlines() if line.startswith("cogvideox_videos_created_total ")
    )


def test_many_clients_at_once_lose_none_and_get_none_twice(server):
    """tools/bench/serving.py does it with 500."""
    ids: list[str] = []

    def ask(k: int) -> None:
        client = client_of(server)
        ids.extend(client.videos.create(prompt=f"{k} {n}", extra_body={"steps": 2}).id for n in range(3))

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client = client_of(server)
    for i in ids:
        assert client.videos.poll(i, poll_interval_ms=100).status == "completed"
    assert len(set(ids)) == 24 and set(ids) <= {video.id for video in client.videos.list(limit=100)}
    records = [json.loads((server.folder / i / "000000.json").read_text()) for i in ids]
    assert Counter(record["prompt"] for record in records) == {f"{k} {n}": 1 for k in range(8) for n in range(3)}


# --- the page ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium or Chrome is installed (apt install chromium), and $BROWSER_FOR_TESTS names none")
    with Browser(program) as browser:
        yield browser


def open_page(browser, server) -> None:
    browser.open(server.address)
    browser.wait("document.querySelector('#queue').innerText.trim() !== ''")  # the page has been told what there is


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_from_a_prompt_to_the_video_that_plays(server, browser, size):
    browser.resize(*size)
    open_page(browser, server)
    prompt = f"a star at {size[0]} pixels"
    browser.type("#prompt textarea", prompt)
    browser.click("#make")
    player = "document.querySelector('#player video')"
    shown = f"document.querySelector('#player').innerText.includes({json.dumps(prompt)})"
    browser.wait(f"{shown} && {player}.videoWidth === 32 && {player}.currentTime > 0 && !{player}.error")
    width = "document.documentElement.scrollWidth <= window.innerWidth"
    assert browser.evaluate(width), "the page is wider than the window"
    browser.click("#again")
    browser.wait("/^\\d+$/.test(document.querySelector('#seed textarea, #seed input').value)")
    assert prompt == browser.evaluate("document.querySelector('#prompt textarea').value")
    elsewhere = [u for u in browser.requested if not u.startswith((server.address, "data:", "blob:", "about:"))]
    assert browser.errors == [] and elsewhere == []


def test_what_is_refused_is_said_and_a_closed_tab_loses_nothing(server, browser):
    browser.resize(*SIZES[0])
    open_page(browser, server)
    browser.type("#prompt textarea", "a star <b>in</b> ${bold}")
    browser.type("#size textarea, #size input", "33x16")
    browser.click("#make")
    browser.wait("document.body.innerText.includes('multiples of 16')")
    browser.type("#size textarea, #size input", "32x16")
    browser.type("#steps textarea, #steps input", "900")
    browser.click("#make")
    browser.wait("document.querySelector('#queue').innerText.includes('${bold}')")
    browser.open("about:blank")  # the tab is closed
    open_page(browser, server)
    browser.wait("document.querySelector('#queue').innerText.includes('a star <b>in</b> ${bold}')")
    browser.wait("/step \\d+ of 900, \\d+ \\w+ left/.test(document.querySelector('#queue').innerText)")
    browser.wait("document.querySelector('#player img')?.naturalWidth > 0")  # a preview
    browser.click("#queue [data-act=cancel]")
    browser.wait("document.querySelector('#queue').innerText.includes('No video is waiting')")


def test_a_clip_and_its_record_fill_the_form(server, browser, tmp_path):
    """The clip to start from is sent as a file; the request comes back from a record, and from the gallery."""
    client = client_of(server)
    first = client.videos.create_and_poll(prompt="first", extra_body={"seed": 3, "steps": 3}, poll_interval_ms=100)
    client.videos.download_content(first.id).write_to_file(tmp_path / "clip.mp4")
    (tmp_path / "clip.json").write_bytes((server.folder / first.id / "000000.json").read_bytes())
    browser.resize(*SIZES[0])
    open_page(browser, server)
    browser.evaluate("[...document.querySelectorAll('button')].find(b => b.innerText.includes('More')).click()")
    browser.wait("!!document.querySelector('#record input[type=file]')")
    browser.choose_files("#record input[type=file]", tmp_path / "clip.json")
    browser.wait("document.querySelector('#prompt textarea').value === 'first'")
    browser.wait("document.querySelector('#seed textarea, #seed input').value === '3'")
    browser.click("#refine input")
    browser.choose_files("#start input[type=file]", tmp_path / "clip.mp4")
    shown = "document.querySelector('#start').innerText"  # names a file that is still on its way, too
    browser.wait(f"{shown}.includes('clip') && !{shown}.includes('Uploading')")
    browser.click("#make")
    wait_for(lambda: len([v for v in client.videos.list() if v.prompt == "first" and v.status == "completed"]) == 2)
    second = client.videos.list(limit=1).data[0]
    record = httpx.get(f"{server.address}/v1/videos/{second.id}/content?variant=record").json()
    assert record["seed"] == 3 and record["strength"] == 0.8 and record["video_sha256"]
    assert (record["prompt"], record["refined_prompt"]) == ("first", CAPTION)
    open_page(browser, server)
    browser.click(f"#gallery [data-job={second.id}]")
    browser.click("#again")
    browser.wait("/start\\s*.mp4/.test(document.querySelector('#start').innerText)")
    browser.type("#prompt textarea", "another")
    browser.click("#again")
    browser.wait("document.querySelector('#prompt textarea').value === 'first'")
    assert len(list((server.folder / "temporary").rglob("start.mp4"))) == 1  # the one that the form holds, for a day


def test_the_form_takes_every_number_that_the_api_takes(server):
    props = [part["props"] for part in httpx.get(f"{server.address}/config").json()["components"]]
    for name, (low, high) in {"Its scale": SCALES, "Strength": STRENGTHS}.items():
        (field,) = (p for p in props if str(p.get("label")).startswith(name))
        assert field.get("minimum") in (None, low) and field.get("maximum") in (None, high), name


def test_what_the_api_does_not_have_is_said_by_it_and_not_by_the_page(server):
    for method, path in (
        ("POST", "/v1/videos/video_0/remix"),
        ("GET", "/v1/files"),
        ("POST", "/videos"),
        ("GET", "/models"),
    ):
        answer = httpx.request(method, f"{server.address}{path}")
        assert answer.status_code == 404 and "base_url ends in /v1" in answer.json()["error"]["message"]


def test_the_page_reads_no_files_of_the_machine(server):
    for path in (server.folder / "jobs.sqlite3", PROJECT / "README.md", Path("/etc/hosts")):
        assert httpx.get(f"{server.address}/gradio_api/file={path}").status_code in (403, 404)


# --- ends --------------------------------------------------------------------------------------------------------


def test_a_worker_that_ends_is_replaced_and_its_job_begins_again(server):
    client = client_of(server)
    video = client.videos.create(prompt="again", extra_body={"steps": 300})
    wait_for(lambda: client.videos.retrieve(video.id).progress > 0)
    (worker,) = server.workers()
    os.kill(worker, signal.SIGKILL)
    assert client.videos.poll(video.id, poll_interval_ms=100).status == "completed"
    assert server.workers() != [worker]


def test_a_kill_loses_nothing(server):
    client = client_of(server)
    done = client.videos.create_and_poll(prompt="done", poll_interval_ms=100)
    running = client.videos.create(prompt="running", extra_body={"steps": 500})
    waiting = [client.videos.create(prompt=f"waiting {k}") for k in range(5)]
    wait_for(lambda: client.videos.retrieve(running.id).progress > 0)
    (worker,) = server.workers()
    known = {video.id for video in client.videos.list(limit=100)}
    server.kill()
    wait_for(lambda: not is_alive(worker), 10)  # it does not outlive its server
    server.start("--no-page")
    client = client_of(server)
    for video in (running, *waiting):
        assert client.videos.poll(video.id, poll_interval_ms=100).status == "completed"
    assert client.videos.retrieve(done.id).completed_at == done.completed_at
    assert {video.id for video in client.videos.list(limit=100)} == known
    assert server.stop() == 130 and "begins again with the next start" in "".join(server.log)


def test_the_script_calls_it():
    shown = subprocess.run(
        ["bash", REPO / "serve.sh", "--help"],
        env={**environment(), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0 and "--api-keys" in shown.stdout, shown.stderr


def test_a_configuration_that_cannot_run_is_one_error(config, tmp_path):
    server = Server(tmp_path, config, "--set", "args.load=/nowhere", "--no-page")
    with pytest.raises(AssertionError, match="error: 1 weight path") as error:
        server.start()
    assert (
        "Traceback" not in str(error.value)
        and "nowhere does not exist" in str(error.value)
        and server.process.wait(10) == 2
    )
