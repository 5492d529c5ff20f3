"""A published adapter: its folder, what the card says, and the upload to a server that speaks the hub's protocol."""

from __future__ import annotations

import ast
import base64
import json
import re
import shlex
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from sgm.config import merge_yaml
from sgm.inference.adapters import read_adapter
from sgm.modules.transformer.lora_state import collect_pairs, lora_delta
from sgm.weights.save import save_pt
from tests.convert_tiny import adapter_matrices
from tests.training_tiny import REPO
from tools import publish

CAPTIONS = ["DISNEY a mouse steers a boat.", "DISNEY two mice dance on a wharf.", "A dog howls, DISNEY."]


class Hub(ThreadingHTTPServer):
    """Repositories by name: whether they are private, and their files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.private: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.refuses = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None: ...

    def answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/").removesuffix("/revision/main")
        found = {"id": name, "private": self.server.private.get(name), "siblings": []}
        self.answer(found, 200 if name in self.server.private else 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers["Authorization"])
        if self.server.refuses:
            return self.answer({"error": "You don't have the rights"}, 403)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            known = name in self.server.private
            self.server.private.setdefault(name, asked.get("visibility") == "private")
            return self.answer({"url": f"{self.server.url}/{name}"}, 409 if known else 200)
        if "/preupload/" in self.path:
            said = {"uploadMode": "regular", "shouldIgnore": False}
            files = [{"path": file["path"], **said} for file in json.loads(body)["files"]]
            return self.answer({"files": files})
        if self.path == "/api/validate-yaml":
            return self.answer({"warnings": [], "errors": []})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer({"commitUrl": f"{self.server.url}/me/x/commit/0", "commitOid": "0" * 40})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def make_run(folder: Path, *configs: str, **args: Any) -> Path:
    """What a LoRA run of the shipped configurations leaves, at iteration 500, its matrices small."""
    run = folder / "ckpts" / "lora-mice-11-24-16-30"
    (run / "500").mkdir(parents=True)
    matrices = adapter_matrices(rank=4, width=64)
    save_pt(run / "500" / "mp_rank_00_model_states.pt", {"module": matrices, "lora": {"rank": 4, "alpha": 1.0}})
    (run / "latest").write_text("500")
    content = merge_yaml([REPO / "configs" / name for name in (*configs, "lora.yaml")])
    content["args"] |= {"train_data": [str(folder / "home" / "mice")], **args}
    (run / "training_config.yaml").write_text(json.dumps(content))
    clips = [folder / "home" / "mice" / "videos" / f"{k}.mp4" for k in range(3)]
    (folder / "home" / "mice" / "labels").mkdir(parents=True)
    for clip, caption in zip(clips, CAPTIONS):
        (clip.parents[1] / "labels" / f"{clip.stem}.txt").write_text(caption)
    lines = [{"status": "head", "usable": 3}, *({"status": "usable", "path": str(clip)} for clip in clips)]
    (run / "train_data_0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps = [{"kind": "train", "iteration": k, "samples": 2 * k, "seconds_per_step": 0.6, "loss_average": 50 / k}
             for k in (100, 500, 600)]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    video = run / "video" / "samples_gs-000500"
    video.mkdir(parents=True)
    for k in range(1 + len(args.get("eval_prompts", []))):
        (video / f"00000{k}.mp4").write_bytes(b"a clip")
    (run / "video_texts").mkdir()  # the captions of a batch of two, of which the first one is sampled
    (run / "video_texts" / "00000500").write_text("DISNEY a cat sails.\nDISNEY a dog swims.\n")
    return run


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_run_s_adapter_with_its_card(tmp_path: Path, capsys: Any, hub: Hub) -> None:
    run = make_run(tmp_path, "cogvideox_2b_sft.yaml", eval_prompts=["a cow", "a fox@@home/fox.png"])
    (run / "video" / "samples_gs-000500" / "000001.mp4").unlink()  # was not finite
    named = str(run).removesuffix("-11-24-16-30")
    assert publish.main([named, "--repo", "someone/mice", "--private"]) == 0
    printed = capsys.readouterr().out
    assert "uploaded: someone/mice" in printed and "base: zai-org/CogVideoX-2b" in printed
    assert hub.private == {"someone/mice": True} and hub.tokens == {"Bearer hf_secret"}
    folder = run / "published"
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert hub.files == found and found["samples/0.mp4"] == b"a clip"
    card = found["README.md"].decode()
    header = front_matter(card)
    assert header["base_model"] == "zai-org/CogVideoX-2b" and header["pipeline_tag"] == "text-to-video"
    assert header["instance_prompt"] == "DISNEY"
    assert header["widget"] == [
        {"text": text, "output": {"url": f"samples/{k}.mp4"}} for k, text in enumerate(["DISNEY a cat sails.", "a fox"])
    ]
    for said in (
        *CAPTIONS, "python sample_video.py configs/cogvideox_2b_infer.yaml --lora someone/mice", "CogVideoXPipeline",
        'pipe.load_lora_weights("someone/mice")', "torch.float16", "CogVideo LoraSelect", "| steps | 500 |",
        "| clips | 3 (mice) |", "| clips a step | 2 |", "| loss at the end | 0.1 |", "| time | 5 minutes |",
        "| rank, alpha | 4, 1 in training", "49 frames of 720x480, 8 a second", "height=480, width=720",
    ):  # fmt: skip
        assert said in card, said
    assert str(tmp_path) not in card
    compile(re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)[0], "card", "exec")
    ours, theirs = read_adapter(str(run)), read_adapter(str(folder))
    for linear, pairs in collect_pairs(ours.network).items():
        expected = lora_delta(*pairs, 1 / 4)
        assert lora_delta(*collect_pairs(theirs.network)[linear], 1.0).allclose(expected, atol=1e-6)
    assert theirs.lora["alpha"] == theirs.lora["rank"] == 4


def test_offline_from_a_picture_with_other_clips(tmp_path: Path, capsys: Any) -> None:
    run = make_run(tmp_path, "cogvideox_5b_i2v_sft.yaml")
    shown = tmp_path / "outputs" / "0_x" / "0"
    shown.mkdir(parents=True)
    prompt = 'a "mouse" für $HOME `pwd` \U0001f42d'
    (shown / "000000.mp4").write_bytes(b"another")
    (shown / "000000.json").write_text(json.dumps({"prompt": prompt}))
    arguments = [str(run / "500"), "--out", str(tmp_path / "mice"), "--samples", str(tmp_path / "outputs")]
    assert publish.main([*arguments, "--trigger", "mouse style", "--base", "me/mine"]) == 0
    assert f"to upload it: hf upload OWNER/NAME {tmp_path / 'mice'}" in capsys.readouterr().out
    card = (tmp_path / "mice" / "README.md").read_text()
    assert front_matter(card)["pipeline_tag"] == "image-to-video"
    assert front_matter(card)["instance_prompt"] == "mouse style" and front_matter(card)["base_model"] == "me/mine"
    assert 'from_pretrained("me/mine"' in card
    assert "CogVideoXImageToVideoPipeline" in card and "--image PICTURE" in card
    command, code = re.findall(r"```(?:shell|python)\n(.*?)```", card, flags=re.DOTALL)
    assert prompt in shlex.split(command)
    (video,) = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.keyword) and node.arg == "prompt")
    assert ast.literal_eval(video.value) == prompt
    assert (tmp_path / "mice" / "samples" / "0.mp4").read_bytes() == b"another"
    assert publish.main(arguments) == 2 and "--overwrite" in capsys.readouterr().err
    assert publish.main([str(run), "--out", str(tmp_path / "x"), "--samples", str(run / "latest")]) == 2
    assert "no .mp4 file" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_a_student_of_the_demo(tmp_path: Path, capsys: Any) -> None:
    """An adapter in no run's folder, for a base that is not published."""
    student = tmp_path / "student-1.5"
    student.symlink_to(REPO / "demo" / "student")
    assert publish.main([str(student)]) == 2 and "--out FOLDER" in capsys.readouterr().err
    assert publish.main([str(student), "--out", str(tmp_path / "student")]) == 0
    card = (tmp_path / "student" / "README.md").read_text()
    assert "\n# student-1.5\n" in card
    assert "distilled to need 4 steps" in card and "base_model" not in card and "ComfyUI" not in card
    assert "few_steps" in read_adapter(str(tmp_path / "student")).lora


def test_an_upload_that_fails_keeps_the_folder(tmp_path: Path, capsys: Any, hub: Hub) -> None:
    run = make_run(tmp_path, "cogvideox_2b_sft.yaml")
    hub.private["me/mice"] = False
    arguments = [str(run), "--repo", "me/mice", "--overwrite"]
    assert publish.main([*arguments, "--private"]) == 2
    assert "me/mice is on the hub already and public" in capsys.readouterr().err and not hub.files
    hub.refuses = True
    assert publish.main(arguments) == 2
    said = capsys.readouterr().err
    assert "is complete, but the upload to the hub failed" in said and "hf auth login" in said
    assert (run / "published" / "README.md").is_file()
    with pytest.raises(SystemExit):
        publish.main([str(run), "--private"])
