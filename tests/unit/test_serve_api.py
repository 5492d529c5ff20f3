"""OpenAI's video API: what is answered to whom, in which form. The clips themselves are painted."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
import socket
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from sgm.serve.__main__ import main, parse
from sgm.serve.app import application
from sgm.serve.desk import Desk, Forecast, same_again
from sgm.serve.guard import Keys
from sgm.serve.jobs import ServeError
from sgm.serve.limits import Limits
from sgm.serve.maker import Maker
from sgm.serve.parameters import Offer, OfferedAdapter, clip_request
from sgm.serve.records import RecordError, left_out, read_fields
from sgm.serve.run import _hosts, _usual_name
from sgm.serve.store import JobStore
from sgm.serve.views import queue
from tests.serve_tiny import FACTS, PICTURES, paint, request

NO_KEYS, KEY, OTHER_KEY = Keys(), "a-key-of-sixteen", "another-client-s-key"
REPEAT = {"x-stainless-retry-count": "1"}
OFFER = Offer({"tiny": FACTS, "pictures": PICTURES}, {"star": OfferedAdapter("/adapters/star", 0.8)})


@pytest.fixture
def desk(tmp_path):
    desk = Desk(JobStore(tmp_path), OFFER, Limits(queued=3, clip=10, upload_bytes=1 << 20, keep_days=1))
    yield desk
    desk.store.close()


@pytest.fixture
def client(desk):
    return client_of(desk)


def client_of(desk, keys=NO_KEYS, hosts=None, base_url="http://127.0.0.1"):
    return TestClient(application(desk, keys, hosts), base_url=base_url, raise_server_exceptions=False)


def png(width=8, height=8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def refused(response, status):
    """The error's message, in OpenAI's form."""
    assert response.status_code == status, response.text
    (key,) = response.json()
    assert key == "error" and set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.json()["error"]["message"]


def test_numbers_come_as_text_and_answers_have_the_form_of_openai(client, desk):
    fields = {"prompt": "a star", "seconds": "2", "size": "48x32", "seed": "7", "steps": "3", "lora[]": "star"}
    created = client.post("/v1/videos", data=fields, files={})
    assert created.status_code == 200 and int(created.headers["openai-poll-after-ms"]) > 0
    video = created.json()
    assert video == client.get(f"/v1/videos/{video['id']}").json()
    expected = {"object": "video", "model": "tiny", "status": "queued", "progress": 0, "size": "48x32", "seconds": "2"}
    assert expected.items() <= video.items() and video["error"] is None and video["seed"] == 7
    job = desk.store.get(video["id"])
    assert job.request == request(size=(32, 48), num_frames=17, seed=7, steps=3, lora=("star:0.8",))
    assert "is queued" in refused(client.get(f"/v1/videos/{job.id}/content"), 404)
    Maker(desk.store, "w", paint).make_next()
    done = client.get(f"/v1/videos/{job.id}").json()
    assert done["status"] == "completed" and done["progress"] == 100
    assert done["expires_at"] == pytest.approx(done["completed_at"] + 86400, abs=1)
    for variant, kind in (("video", "video/mp4"), ("thumbnail", "image/webp"), ("spritesheet", "image/jpeg")):
        content = client.get(f"/v1/videos/{job.id}/content", params={"variant": variant})
        assert content.status_code == 200 and content.headers["content-type"] == kind and len(content.content) > 50
    part = client.get(f"/v1/videos/{job.id}/content", headers={"range": "bytes=4-7"})
    assert part.status_code == 206 and part.content == b"ftyp"  # players ask for parts
    assert "variant" in refused(client.get(f"/v1/videos/{job.id}/content?variant=sound"), 400)
    assert "no preview" in refused(client.get(f"/v1/videos/{job.id}/content?variant=preview"), 404)  # it has gone


@pytest.mark.parametrize(
    "fields, param, said",
    [
        ({}, "prompt", "Missing"),
        ({"prompt": " "}, "prompt", "Missing"),
        ({"prompt": "a@@/etc/passwd"}, "prompt", "input_reference"),
        ({"prompt": "a", "model": "sora-2"}, "model", "has tiny, pictures"),
        ({"prompt": "a", "size": "16"}, "size", "as 32x16"),
        ({"prompt": "a", "size": "33x16"}, "size", "multiples of 16"),
        ({"prompt": "a", "size": "3200x1600"}, "size", "more than this server makes"),
        ({"prompt": "a", "seconds": "1.5"}, "seconds", "1 and 2 seconds"),
        ({"prompt": "a", "seconds": "nan"}, "seconds", "number from 0"),
        ({"prompt": "a", "seconds": "99"}, "seconds", "more than this server makes"),
        ({"prompt": "a", "steps": "2.5"}, "steps", "whole number"),
        ({"prompt": "a", "steps": "201"}, "steps", "from 2 to 200"),
        ({"prompt": "a", "steps": "1"}, "steps", "from 2 to 200"),
        ({"prompt": "a", "stepps": "2"}, "stepps", "Did you mean 'steps'"),
        ({"prompt": "a", "lora": "/etc/passwd"}, "lora", "has star"),
        ({"prompt": "a", "lora": "star:x"}, "lora", "number"),
        ({"prompt": "a", "lora": "star", "lora[]": "star:0.5"}, "lora", "'star' twice"),
        ({"prompt": "a", "mode": "slow"}, "mode", "full, fast, few_steps"),
        ({"prompt": "a", "refine": "true"}, "refine", "OPENAI_API_KEY"),
        ({"prompt": "a", "strength": "0.5"}, "strength", "start video"),
        ({"prompt": "a", "model": "pictures"}, "input_reference", "begins its videos with a picture"),
        ({"prompt": ["a", "b"]}, "prompt", "2 times"),
        ({"prompt": "a", "input_reference": "text"}, "input_reference", "is a file"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_refused_by_name(client, desk, fields, param, said):
    response = client.post("/v1/videos", data=fields)
    assert said in refused(response, 400) and response.json()["error"]["param"] == param
    assert desk.store.counts()["queued"] == 0


def test_a_file_is_what_its_content_says(client, desk):
    send = {"input_reference": ("upload", png(), "application/octet-stream")}  # as the client sends bytes
    made = client.post("/v1/videos", data={"prompt": "a", "model": "pictures"}, files=send).json()
    job = desk.store.get(made["id"])
    assert job.request.image == "start.png" and (desk.store.files(job.id).folder / "start.png").read_bytes() == png()
    assert "starts from a video" in refused(client.post("/v1/videos", data={"prompt": "a"}, files=send), 400)
    for data in (b"", b"text", png()[:40], b"GIF89a"):
        files = {"input_reference": ("../../../etc/x.png", data, "image/png")}
        response = client.post("/v1/videos", data={"prompt": "a", "model": "pictures"}, files=files)
        assert "no whole PNG" in refused(response, 400)
    assert [path.name for path in desk.store.folder.iterdir() if path.is_dir()] == [job.id]
    assert [path.name for path in desk.store.files(job.id).folder.iterdir()] == ["start.png"]
    jpeg, picture = io.BytesIO(), Image.new("RGB", (8, 8))
    picture.save(jpeg, "MPO", save_all=True, append_images=[picture])  # as telephones write JPEG
    files = {"input_reference": jpeg.getvalue()}
    made = client.post("/v1/videos", data={"prompt": "a", "model": "pictures"}, files=files).json()
    assert desk.store.get(made["id"]).request.image == "start.jpg"
    other = client.post("/v1/videos", data={"prompt": "a"}, files={"file": ("x", png())})
    assert "sent as input_reference" in refused(other, 400)
    two = client.post(
        "/v1/videos", data={"prompt": "a"}, files=[("input_reference", png()), ("input_reference", png())]
    )
    assert "Too many files" in refused(two, 400)


def test_json_is_taken_too_and_nothing_is_fetched(client, desk):
    address = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    fields = {"prompt": "a", "model": "pictures", "seed": 3, "refine": False, "input_reference": {"image_url": address}}
    made = client.post("/v1/videos", json=fields)
    assert desk.store.get(made.json()["id"]).request.seed == 3
    for reference in ({"image_url": "http://127.0.0.1/x.png"}, {"image_url": "file:///etc/passwd"}, {"file_id": "f"}):
        assert refused(client.post("/v1/videos", json={**fields, "input_reference": reference}), 400)
    for text, said in (
        ("{", "no JSON"),
        ("[" * 200000, "no JSON"),
        ('{"prompt": "a \\ud800 star"}', "half a character"),
    ):
        response = client.post("/v1/videos", content=text, headers={"content-type": "application/json"})
        assert said in refused(response, 400)
    assert [video["prompt"] for video in client.get("/v1/videos").json()["data"]] == ["a"]


def test_a_create_that_is_sent_again_makes_one_clip(client, desk):
    send = {"data": {"prompt": "a"}, "files": {}}
    first = client.post("/v1/videos", **send).json()["id"]
    again = client.post("/v1/videos", **send, headers={"x-stainless-retry-count": "1"}).json()["id"]
    assert again == first != client.post("/v1/videos", **send).json()["id"]
    keyed = [client.post("/v1/videos", **send, headers={"idempotency-key": "k"}).json()["id"] for _ in range(2)]
    assert keyed[0] == keyed[1]
    other = client.post("/v1/videos", data={"prompt": "b"}, headers={"idempotency-key": "k"})
    assert "another request" in refused(other, 422)
    full = client.post("/v1/videos", data={"prompt": "b"})
    assert "3 videos wait" in refused(full, 429) and full.headers["retry-after"]
    assert desk.store.counts()["queued"] == 3


def test_idempotency_keys_are_each_client_s_own(desk):
    client = client_of(desk, Keys([KEY, OTHER_KEY]))

    def sent(key, prompt="a"):
        headers = {"authorization": f"Bearer {key}", "idempotency-key": "k"}
        return client.post("/v1/videos", data={"prompt": prompt}, headers=headers)

    first, other = sent(KEY), sent(OTHER_KEY, "b")
    assert other.status_code == 200 and other.json()["prompt"] == "b"
    assert (sent(KEY).json()["id"], sent(OTHER_KEY, "b").json()["id"]) == (first.json()["id"], other.json()["id"])
    assert "another request" in refused(sent(OTHER_KEY), 422)
    same = [client.post("/v1/videos", data={"prompt": "c"}, headers={"authorization": f"Bearer {key}", **REPEAT})
            for key in (KEY, OTHER_KEY)]  # fmt: skip
    assert desk.store.counts()["queued"] == 3 and "3 videos wait" in refused(same[1], 429)


def test_lists_page_by_page(client):
    ids = [client.post("/v1/videos", data={"prompt": f"{k}"}).json()["id"] for k in range(3)]
    page = client.get("/v1/videos", params={"limit": 2}).json()
    assert [v["id"] for v in page["data"]] == ids[:0:-1] and page["has_more"] and page["last_id"] == ids[1]
    rest = client.get("/v1/videos", params={"limit": 2, "after": page["last_id"]}).json()
    assert [v["id"] for v in rest["data"]] == ids[:1] and not rest["has_more"]
    for params in ({"limit": 0}, {"limit": "x"}, {"order": "up"}):
        assert refused(client.get("/v1/videos", params=params), 400)
    assert refused(client.get("/v1/videos", params={"after": "video_x"}), 404)


def test_deleted_expired_and_unknown_are_not_found(client, desk):
    made = client.post("/v1/videos", data={"prompt": "a"}).json()["id"]
    assert client.delete(f"/v1/videos/{made}").json() == {"id": made, "object": "video.deleted", "deleted": True}
    for method in ("GET", "DELETE"):
        assert "No video" in refused(client.request(method, f"/v1/videos/{made}"), 404)
    old = client.post("/v1/videos", data={"prompt": "a"}).json()["id"]
    Maker(desk.store, "w", paint).make_next()
    desk.store._connection.execute("UPDATE jobs SET finished_at = finished_at - 90000")
    desk.expire()
    assert "kept for 1 days" in refused(client.get(f"/v1/videos/{old}"), 404)
    assert "/v1/videos" in refused(client.put("/v1/videos"), 404)


@pytest.mark.parametrize("path", ["../jobs.sqlite3", "%2e%2e%2fjobs.sqlite3", "video_..%2f..", "..%5c..", "%00"])
def test_no_name_leads_out_of_the_folder(client, path):
    for variant in ("video", "../jobs.sqlite3"):
        assert client.get(f"/v1/videos/{path}/content", params={"variant": variant}).status_code in (400, 404)


def test_models_by_name(client):
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny", "pictures"]
    assert client.get("/v1/models/pictures").json()["object"] == "model"
    assert refused(client.get("/v1/models/sora-2"), 404)


def test_requests_have_a_largest_size(client):
    large = client.post("/v1/videos", data={"prompt": "a"}, files={"input_reference": bytes(3 << 20)})
    assert "larger than 2 MiB" in refused(large, 413)
    pieces = (bytes(1 << 19) for _ in range(6))  # whose length is not announced
    assert "larger" in refused(client.post("/v1/videos", content=pieces, headers=form_headers()), 413)


def form_headers():
    return {"content-type": "multipart/form-data; boundary=x"}


def test_keys(desk, tmp_path, monkeypatch, capfd):
    file = tmp_path / "keys"
    file.write_text(f"# for the office\n{KEY}\n")
    monkeypatch.setenv("COGVIDEOX_API_KEYS", "another-key-of-the-environment")
    client = client_of(desk, Keys.read(file))
    basic = base64.b64encode(f"anybody:{KEY}".encode()).decode()
    for good in (f"Bearer {KEY}", "Bearer another-key-of-the-environment", f"Basic {basic}"):
        assert client.get("/v1/videos", headers={"authorization": good}).status_code == 200
    for bad in ("", KEY, f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", "Basic !", "Bearer  ", "Bearer é".encode()):
        for path in ("/v1/videos", "/metrics", "/openapi.json", "/"):
            response = client.get(path, headers={"authorization": bad})
            assert "API key" in refused(response, 401) and KEY not in response.text
    assert client.get("/health").status_code == 200
    assert KEY not in "".join(capfd.readouterr())
    file.write_text("short\n")
    with pytest.raises(ServeError, match="fewer than 16") as error:
        Keys.read(file)
    assert "short" not in str(error.value)
    with pytest.raises(ServeError, match="cannot be read"):
        Keys.read(tmp_path / "none")


def test_pages_of_other_sites_may_not_call(desk):
    client = client_of(desk, hosts=["localhost", "gpubox", "::1"])
    assert client.get("/v1/videos").status_code == 200
    for address in ("127.0.0.1", "127.0.0.1:80", "gpubox:7860", "192.0.2.7", "[::1]:7860"):
        for origin in (f"http://{address}", f"https://{address}"):
            assert client.get("/v1/videos", headers={"host": address, "origin": origin}).status_code == 200
    evil = [
        {"host": "evil.example"},
        {"host": "[::1"},
        {"host": ""},
        {"host": "evil.example", "origin": "http://evil.example"},
    ]
    evil += [{"origin": o} for o in FOREIGN]
    for headers in evil:
        assert refused(client.post("/v1/videos", data={"prompt": "a"}, headers=headers), 403)
    assert desk.store.counts()["queued"] == 0
    assert client.get("/health", headers={"host": "server"}).status_code == 200  # probes call by names of their own
    assert "--allow-host lab.example)" in refused(client.get("/v1/videos", headers={"host": "lab.example:80"}), 403)


FOREIGN = ("http://evil.example", "http://127.0.0.1:81", "http://gpubox", "http://[::1", "null", "")


def test_a_browser_s_password_serves_no_other_site(desk):
    """It sends what it was told once along with forms of other sites, too. A name is no matter where keys are asked."""
    client = client_of(desk, Keys([KEY]), base_url="http://videos.example.org")
    password = {"authorization": f"Basic {base64.b64encode(f':{KEY}'.encode()).decode()}"}
    own = client.post("/v1/videos", data={"prompt": "a"}, headers={**password, "origin": "https://videos.example.org"})
    assert own.status_code == 200
    assert own.headers["content-security-policy"] == "frame-ancestors 'self'"  # nor may they show the page as theirs
    for origin in FOREIGN:
        said = refused(client.post("/v1/videos", data={"prompt": "b"}, headers={**password, "origin": origin}), 403)
        assert "other sites" in said
    assert desk.store.counts()["queued"] == 1


@pytest.mark.parametrize(
    "options, keys, expected",
    [
        ([], NO_KEYS, {"localhost", "127.0.0.1"}),
        (["--host", "0.0.0.0"], NO_KEYS, {"localhost", "0.0.0.0"}),
        (["--host", "gpubox"], NO_KEYS, {"localhost", "gpubox"}),
        (["--host", "0.0.0.0", "--allow-host", "gpubox"], Keys([KEY]), {"localhost", "0.0.0.0", "gpubox"}),
        (["--host", "0.0.0.0"], Keys([KEY]), None),
    ],
)
def test_names_of_a_server_are_known_or_keys_are_asked(options, keys, expected):
    names = _hosts(parse(options), keys)
    assert names == expected if expected is None else set(names) == expected | {socket.gethostname()}


def test_metrics_and_health(client, desk):
    client.post("/v1/videos", data={"prompt": "a"})
    Maker(desk.store, "w", paint).make_next()
    client.post("/v1/videos", data={"prompt": "a"})
    text = client.get("/metrics").text
    for line in text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) \w+ .+|cogvideox_\w+(\{\w+="\w+"\})? [\d.e+]+', line), line
    assert 'cogvideox_videos_total{outcome="completed"} 1' in text and 'cogvideox_videos{state="queued"} 1' in text
    assert client.get("/health").json() == {"status": "ok", "workers": 1}
    desk.alive = lambda: 0
    assert client.get("/health").status_code == 503


def test_what_is_not_installed_is_one_error_with_a_command(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else found(name))
    assert main(["configs/demo_infer.yaml"]) == 2
    said = capsys.readouterr().err
    assert "lacks the package 'gradio'" in said and "bash serve.sh" in said and "sgm/serve/requirements.txt" in said


def test_a_bug_is_an_error_in_the_same_form(client, desk, monkeypatch):
    monkeypatch.setattr(desk, "take", lambda *_, **__: len(None))
    assert "TypeError" in refused(client.post("/v1/videos", data={"prompt": "a"}), 500)


def test_times_follow_from_what_was_measured(desk):
    ids = [desk.take({"prompt": [f"{k}"]}, None).id for k in range(3)]
    assert desk.forecast().seconds[ids[2]] is None  # nothing was made yet
    Maker(desk.store, "w", paint).make_next()
    desk.store._connection.execute("UPDATE jobs SET started_at = finished_at - 10 WHERE id = ?", (ids[0],))
    desk.store.claim("w")
    desk.store.step(ids[1], "w", 1, 5)
    jobs, done = desk.store.waiting(), desk.store.last_completed(5)
    forecast = Forecast(jobs, done, 1, (jobs[0].started_at or 0) + 2)
    assert forecast.positions == {ids[1]: 0, ids[2]: 1}
    assert forecast.seconds[ids[1]] == pytest.approx(8) and forecast.seconds[ids[2]] == pytest.approx(18)
    assert Forecast(jobs, done, 2, (jobs[0].started_at or 0) + 2).seconds[ids[2]] == pytest.approx(14)
    desk.store.step(ids[1], "w", 3, 3)  # its steps are done, and it is decoded: as long as others took
    jobs = desk.store.waiting()
    left = [Forecast(jobs, known, 1, (jobs[0].started_at or 0) + 7) for known in (done, [])]
    assert [forecast.seconds[ids[1]] for forecast in left] == [pytest.approx(3), None]
    assert "decoding, 3 s left" in queue(jobs, left[0]) and "decoding<" in queue(jobs, left[1])


def test_times_grow_with_the_steps_that_are_asked_for(desk):
    ids = [desk.take({"prompt": ["a"], **steps}, None).id for steps in ({}, {"steps": ["30"]}, {})]
    Maker(desk.store, "w", paint).make_next()  # in three steps
    desk.store._connection.execute("UPDATE jobs SET started_at = finished_at - 3 WHERE id = ?", (ids[0],))
    seconds = desk.forecast().seconds
    assert [seconds[job] for job in ids[1:]] == pytest.approx([30, 33])
    desk.store.delete(ids[1])
    fast = desk.take({"prompt": ["a"], "mode": ["fast"]}, None)  # a mode that none had: the model's five steps
    assert desk.forecast().seconds[fast.id] == pytest.approx(3 + 5)


@pytest.mark.parametrize(
    "options, said",
    [
        (["--workers", "0"], "--workers is 0; it must be above 0"),
        (["--keep-days", "-1"], "--keep-days is -1"),
        (["--lora", "a=b:11"], "--lora a=b:11: its scale must be from -10 to 10"),
        (["--lora", "a=b:nan"], "from -10 to 10"),
        (["--lora", "x/a-1.5", "--lora", "x/a-1.5.safetensors:2"], ":2: each adapter needs a name of its own"),
        (["--lora", "x/a-1.5", "--lora", "x/a-1.6", "--port", "99999"], "cannot listen at 127.0.0.1, port 99999"),
        (["--port", "99999"], "cannot listen at 127.0.0.1, port 99999"),
        (["--model", "a=configs/demo_infer.yaml", "--name", "b"], "write --model NAME=FILE"),
    ],
)
def test_options_that_mean_nothing_are_one_error(options, said, tmp_path, capsys):
    assert main([*options, "--no-page", "--output-dir", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_a_released_model_is_called_as_its_folder():
    assert _usual_name(Path("weights/zai-org/CogVideoX-2b/infer.yaml")) == "CogVideoX-2b"
    assert _usual_name(Path("configs/demo_infer.yaml")) == "demo"


def test_same_again_from_a_request_and_from_a_record(tmp_path):
    asked = request(seed=5, steps=4, negative_prompt="blur", guidance_scale=3.0, lora=("star:0.5",), mode="fast")
    assert clip_request(same_again(asked), None, OFFER, Limits()) == asked
    record = {"prompt": "a star", "negative_prompt": "", "seed": 5, "num_steps": 4, "size": [16, 32], "fps": 8,
              "latent_frames": 3, "guidance": {"guider": "DynamicCFG", "scale": 6.0}, "lora": ["/adapters/star:0.5"],
              "approximate": {}, "strength": None, "refine": False}  # fmt: skip
    file = tmp_path / "000000.json"
    file.write_text(json.dumps(record))
    again = clip_request(read_fields(file, OFFER), None, OFFER, Limits())
    assert again == request(seed=5, steps=4, guidance_scale=6.0, lora=("star:0.5",))
    file.write_text(json.dumps({**record, "lora": ["/adapters/student"]}))
    assert clip_request(read_fields(file, OFFER), None, OFFER, Limits()).mode == "few_steps"
    file.write_text(json.dumps({**record, "lora": ["/adapters/moon"]}))
    with pytest.raises(RecordError, match="does not offer"):
        read_fields(file, OFFER)
    file.write_text(json.dumps({**record, "extend": 8}))
    with pytest.raises(RecordError, match="goes on with another one"):
        read_fields(file, OFFER)
    assert "star:0.5, moon:1 the form takes the first" in left_out({"lora": ["star:0.5", "moon:1"]}, True)
    assert "choose it, too" in left_out({"strength": ["0.5"]}, False)
    assert not left_out({"strength": ["0.5"], "lora": ["star:1"]}, True)
    for text in ("[]", "{}", "{", '{"prompt": 1}'):
        file.write_text(text)
        with pytest.raises(RecordError, match="no record of a clip"):
            read_fields(file, OFFER)
