"""Prompt refinement against a local HTTP server that speaks the protocol, well and badly."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sgm.inference.prompts import PromptError
from sgm.inference.refine import SYSTEM_PROMPT, Endpoint, RefineError, clean, refine
from tools import convert_demo
from tools.refine_file import refine_file

KEY = "sk-secret-123"
Reply = Callable[[Any], None]


def answer(handler: Any, status: int, body: bytes, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def says(content: Any, **choice: Any) -> Reply:
    body = {"choices": [{"message": {"role": "assistant", "content": content}, **choice}]}
    return lambda handler: answer(handler, 200, json.dumps(body).encode())


def status(code: int, body: bytes = b"{}", **headers: str) -> Reply:
    return lambda handler: answer(handler, code, body, **headers)


class Server:
    """Plays `script` reply by reply (the last one for ever) and remembers what it was asked."""

    def __init__(self) -> None:
        self.script: list[Reply] = [says("a caption")]
        self.asked: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.asked.append({"path": self.path, **content})
                    server.headers.append(self.headers)
                    reply = server.script.pop(0) if len(server.script) > 1 else server.script[0]
                with suppress(BrokenPipeError, ConnectionResetError):  # the client gave up, as it should
                    reply(self)

            def log_message(self, *_: Any) -> None: ...

        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    running = Server()
    monkeypatch.setenv("OPENAI_BASE_URL", running.url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield running
    running.http.shutdown()
    running.http.server_close()


def asked(server: Server, prompt: str = "a fox", **settings: Any) -> tuple[str, list[float]]:
    """(caption, seconds that were waited between attempts)"""
    waits: list[float] = []
    endpoint = Endpoint.from_environment("tiny", **{"timeout": 5.0, "pause": 1.0, "attempts": 3, **settings})
    return refine(prompt, endpoint, sleep=waits.append), waits


def test_request_and_answer(server: Server) -> None:
    server.script = [says('  "A red fox\n walks." ', finish_reason="stop")]
    assert asked(server, "un renard \u96ea") == ("A red fox walks.", [])
    (request,) = server.asked
    assert request["path"] == "/v1/chat/completions" and request["model"] == "tiny" and request["stream"] is False
    assert request["messages"] == [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": "un renard \u96ea"},
    ]
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_no_key_for_a_server_that_wants_none(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    assert asked(server)[0] == "a caption" and server.headers[0]["Authorization"] is None


@pytest.mark.parametrize(
    ("text", "caption"),
    [("<think>hm, \n a fox?</think>\n A fox. ", "A fox."), ("\u201cA fox.\u201d", "A fox."), ('"A" and "B"!', '"A" and "B"!'),
     ("a\n\n b\t c", "a b c"), ('"', '"')],
)  # fmt: skip
def test_clean(text: str, caption: str) -> None:
    assert clean(text) == caption


def test_parts_of_text_and_length() -> None:
    assert convert_demo.is_long("word " * 170) and not convert_demo.is_long("word " * 120)
    assert "226 tokens" in SYSTEM_PROMPT and not convert_demo.is_long(" ".join(["w"] * 130))


def slow(handler: Any) -> None:
    time.sleep(1.0)
    says("too late")(handler)


def trickle(handler: Any) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(40):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def hang_up(handler: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices"')
    handler.connection.shutdown(socket.SHUT_RDWR)


PASSING: dict[str, tuple[Reply, str]] = {
    "429": (status(429, b'{"error": {"message": "slow down"}}'), "429: slow down"),
    "500": (status(500, b"<html><h1>Oops</h1></html>"), "500: Oops"),
    "503": (status(503, b""), "503"),
    "timeout": (slow, "no answer within 0.3 seconds"),
    "trickle": (trickle, "no complete answer within 0.3 seconds"),
    "hang up": (hang_up, "the connection broke off|not of the chat-completions protocol"),
    "no json": (status(200, b"hello"), "not of the chat-completions protocol"),
    "no choices": (status(200, b'{"choices": []}'), "not of the chat-completions protocol"),
    "list": (status(200, b"[1]"), "not of the chat-completions protocol"),
    "no text": (says(None), "an empty answer"),
    "empty": (says(" \n "), "an empty answer"),
    "only thought": (says("<think>hm</think>"), "an empty answer"),
    "cut off": (says("A fox in", finish_reason="length"), "cut off"),
    "flood": (status(200, b"x" * ((1 << 20) + 1)), "more than"),
}


@pytest.mark.parametrize("case", PASSING)
def test_passing_failures_are_tried_again_then_reported(server: Server, case: str) -> None:
    reply, words = PASSING[case]
    server.script = [reply, says([{"type": "text", "text": "a "}, {"type": "text", "text": "caption"}])]
    assert asked(server, timeout=0.3) == ("a caption", [1.0])
    server.script = [reply]
    with pytest.raises(RefineError, match=words) as failed:
        asked(server, timeout=0.3, attempts=2)
    assert not failed.value.fatal and "2 attempts" in str(failed.value) and KEY not in str(failed.value)
    assert len(server.asked) == 4


def test_waits_double_and_heed_the_server(server: Server) -> None:
    server.script = [
        status(500),
        status(429, Retry_After="7"),
        status(429, Retry_After="Fri, 01 Jan 2027"),
        says("a caption"),
    ]
    assert asked(server, attempts=4) == ("a caption", [1.0, 7.0, 4.0])
    server.script = [status(429, Retry_After="9999"), says("a caption")]
    assert asked(server)[1] == [60.0]


FATAL: dict[str, tuple[Reply, str]] = {
    "401": (
        status(401, json.dumps({"error": {"message": f"bad key {KEY}"}}).encode()),
        "401: bad key .key.. Check OPENAI_API_KEY",
    ),
    "403": (status(403), "403.*OPENAI_API_KEY"),
    "404": (status(404, b'{"error": {"message": "no such model"}}'), "no such model.*'tiny'.*--model"),
    "quota": (status(429, b'{"error": {"message": "You exceeded your current quota"}}'), "no quota left"),
    "redirect": (status(302, b"", Location="http://127.0.0.1:1/other"), "redirects to http://127.0.0.1:1/other"),
}


@pytest.mark.parametrize("case", FATAL)
def test_what_stays_wrong_is_not_tried_again(server: Server, case: str) -> None:
    reply, words = FATAL[case]
    server.script = [reply]
    with pytest.raises(RefineError, match=words) as failed:
        asked(server)
    assert failed.value.fatal and len(server.asked) == 1 and KEY not in str(failed.value)


@pytest.mark.parametrize("reply", [says(None, finish_reason="content_filter"), status(400, b'{"error": {"message": "bad words"}}'),
                                   says("x", message={"content": None, "refusal": "I would rather not"})])  # fmt: skip
def test_a_refused_prompt_is_its_own_failure(server: Server, reply: Reply) -> None:
    server.script = [reply]
    with pytest.raises(RefineError, match="content filter|bad words|rather not") as failed:
        asked(server)
    assert not failed.value.fatal and len(server.asked) == 1


def test_no_network(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{port}/v1")
    assert convert_demo.main(["--prompt", "x", "--retry", "1"]) == 2
    printed = capsys.readouterr().err
    assert "no connection" in printed and "OPENAI_BASE_URL" in printed and printed.count("\n") == 1


@pytest.mark.parametrize(("url", "key", "words"), [("", "", "needs OPENAI_API_KEY"), ("file:///etc", "k", "must be an address"),
                                                   ("localhost:8000", "k", "must be an address"), ("http://x/v1", "a\u00e4", "characters")])  # fmt: skip
def test_settings_are_checked_first(
    monkeypatch: pytest.MonkeyPatch, url: str, key: str, words: str, capsys: Any
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    assert convert_demo.main(["--prompt", "x"]) == 2
    assert words in capsys.readouterr().err


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def wishes(tmp_path: Path) -> Path:
    file = tmp_path / "wishes.txt"
    file.write_text("one\n\n two two \nthree three\none\n", encoding="utf-8")
    return file


def fake(failing: dict[str, RefineError], calls: list[str]) -> Any:
    def refiner(prompt: str, endpoint: Endpoint) -> str:
        calls.append(prompt)
        time.sleep(0.03 if prompt == "one" else 0.0)  # the first line is finished last
        if prompt in failing:
            raise failing[prompt]
        return f"caption of {prompt}"

    return refiner


def test_a_file_keeps_its_order_and_blank_lines(wishes: Path, tmp_path: Path) -> None:
    calls: list[str] = []
    target = tmp_path / "captions.txt"
    outcome = refine_file(wishes, target, Endpoint(), fake({}, calls), jobs=4)
    assert target.read_text() == "caption of one\n\ncaption of two two\ncaption of three three\ncaption of one\n"
    assert (
        outcome.failures == {}
        and sorted(calls) == ["one", "three three", "two two"]
        and sorted(tmp_path.iterdir()) == [target, wishes]
    )
    with pytest.raises(PromptError, match="--overwrite"):
        refine_file(wishes, target, Endpoint(), fake({}, calls))
    with pytest.raises(PromptError, match="the input file itself"):
        refine_file(wishes, wishes, Endpoint(), fake({}, calls), overwrite=True)
    refine_file(wishes, target, Endpoint(), fake({}, calls), overwrite=True)


def test_failed_lines_are_named_and_tried_again(wishes: Path, tmp_path: Path) -> None:
    target, reports = tmp_path / "captions.txt", []
    outcome = refine_file(
        wishes, target, Endpoint(), fake({"two two": RefineError("refused")}, []), report=reports.append
    )
    assert outcome.failures == {3: "refused"} and not target.exists()
    assert [line for line in reports if "failed" in line] == ["line 3: failed: refused"]
    journal = tmp_path / "captions.txt.progress.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"prompt": "two two", "capt\xe9')  # killed while writing
    calls: list[str] = []
    outcome = refine_file(wishes, target, Endpoint(), fake({}, calls))
    assert (
        calls == ["two two"]
        and outcome.reused == 3
        and outcome.asked == 1
        and "caption of two two" in target.read_text()
    )
    assert not journal.exists()


def test_any_letters_survive_a_restart(tmp_path: Path) -> None:
    wish = "\u96ea \u2028 \x0b \U0001f98a \x85 end"
    (tmp_path / "w.txt").write_text(f"{wish}\nbad\n", encoding="utf-8", newline="\n")
    refine_file(tmp_path / "w.txt", tmp_path / "c.txt", Endpoint(), fake({"bad": RefineError("no")}, []))
    calls: list[str] = []
    refine_file(tmp_path / "w.txt", tmp_path / "c.txt", Endpoint(), fake({}, calls))
    assert calls == ["bad"] and (tmp_path / "c.txt").read_bytes() == f"caption of {wish}\ncaption of bad\n".encode()


def test_a_fatal_failure_stops_and_keeps_what_is_done(wishes: Path, tmp_path: Path) -> None:
    calls: list[str] = []
    failing = {"two two": RefineError("no key", fatal=True)}
    with pytest.raises(RefineError, match="no key"):
        refine_file(wishes, tmp_path / "c.txt", Endpoint(), fake(failing, calls))
    assert calls == ["one", "two two"] and not (tmp_path / "c.txt").exists()
    other_model: list[str] = []
    refine_file(wishes, tmp_path / "c.txt", Endpoint("other"), fake({}, other_model))
    assert other_model == ["one", "two two", "three three"]  # captions of another model are not taken over


def test_the_command(server: Server, wishes: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["--input-file", str(wishes), "--output-file", str(tmp_path / "c.txt"), "--jobs", "1", "--retry", "1"]
    server.script = [says("first"), status(400), says("third")]
    assert convert_demo.main(arguments) == 2
    assert "1 prompts failed (lines 3)" in capsys.readouterr().err and not (tmp_path / "c.txt").exists()
    server.script = [says("second")]
    assert convert_demo.main(arguments) == 0
    assert (tmp_path / "c.txt").read_text() == "first\n\nsecond\nthird\nfirst\n"
    assert convert_demo.main(["--prompt", " a fox ", "--model", "m"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "second" and server.asked[-1]["model"] == "m"
    assert convert_demo.main(["--prompt", "a fox@@ my/fox.png"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "second@@ my/fox.png"
    assert server.asked[-1]["messages"][-1]["content"] == "a fox", "pictures are sent nowhere"
    assert convert_demo.main(["--prompt", "  "]) == 2
    (tmp_path / "bytes.txt").write_bytes(b"ok\n\xff\xfe\n")
    bad = ["--input-file", str(tmp_path / "bytes.txt"), "--output-file", str(tmp_path / "d.txt")]
    assert convert_demo.main(bad) == 2 and "not UTF-8" in capsys.readouterr().err


# --- while sampling --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampling(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that sample a tiny release."""
    import torch

    from sgm.convert.dit_sizes import sizes_of_params
    from sgm.convert.to_sat import run_file
    from tests.convert_tiny import VAE_PARAMS, model_section
    from tests.dit_tiny import tiny_config
    from tools.random_release import write_random_release

    folder = tmp_path_factory.mktemp("refine") / "w"
    write_random_release(model_section(folder), folder, dtype=torch.float32, t5_name="t5-v1_1-xxl")
    sizes = sizes_of_params(tiny_config()["params"])
    (folder / "infer.yaml").write_text(run_file(folder, sizes, VAE_PARAMS, 1.0, 3.0, torch.float32))
    return [str(folder / "infer.yaml"), "--device", "cpu", "--steps", "2", "--num-frames", "1", "--only-save-latents"]


def test_refine_while_sampling(server: Server, sampling: list[str], tmp_path: Path, capsys: Any) -> None:
    import sample_video

    wish = ["--prompt", "a fox", "--output-dir", str(tmp_path)]
    assert sample_video.main([*sampling, *wish]) == 0 and not server.asked
    plain = json.loads((tmp_path / "0_a_fox" / "0" / "000000.json").read_text())
    server.script = [says("A red fox walks over snow."), says("something else")]
    assert sample_video.main([*sampling, *wish, "--refine", "--refine-model", "m"]) == 0
    facts = json.loads((tmp_path / "0_a_fox" / "0" / "000000.json").read_text())
    assert (facts["prompt"], facts["refined_prompt"]) == ("a fox", "A red fox walks over snow.")
    assert plain["refined_prompt"] is None and facts["latents_sha256"] != plain["latents_sha256"]
    assert [asked["model"] for asked in server.asked] == ["m"]
    more = [*sampling, *wish, "--refine", "--skip-done", "--batch-size", "2"]  # the second sample gets the same caption
    assert sample_video.main(more) == 0 and len(server.asked) == 1
    second = json.loads((tmp_path / "0_a_fox" / "1" / "000000.json").read_text())
    assert second["refined_prompt"] == "A red fox walks over snow."
    server.script = [status(401)]
    capsys.readouterr()
    assert sample_video.main([*sampling, "--prompt", "a cat", "--output-dir", str(tmp_path / "n"), "--refine"]) == 2
    assert "prompt 0 could not be refined" in capsys.readouterr().err and not list((tmp_path / "n").rglob("*.json"))
