"""Released models from a local server that speaks the hub's protocol: breaks, damage, what is missing, first use."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sgm.convert.lazy import all_deferred
from sgm.convert.output import write_shards
from sgm.convert.to_hf import ToHf, convert
from sgm.files import SaveError
from sgm.hub import download, release
from sgm.hub.client import Hub, HubError
from sgm.hub.release import Wish, get_release, run_file_of, wanted
from tests.convert_tiny import make_release
from tests.hub_server import COMMIT, LARGE, hub_server
from tests.sampling_tiny import REPO, environment, main

NAME = "zai-org/CogVideoX-2b"
SHARD = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A tiny pipeline in diffusers' layout, its transformer in two shards, with files beside that nobody needs."""
    folder = tmp_path_factory.mktemp("hub")
    sat = make_release(folder / "sat")
    parts = sat / "transformer", sat / "vae" / "3d-vae.pt", str(sat / "t5")
    convert(ToHf(folder / "hf", *parts, config=sat / "infer.yaml"))
    whole = folder / "hf" / "transformer" / "diffusion_pytorch_model.safetensors"
    write_shards(whole.parent, whole.stem, all_deferred(load_file(whole)), 1_200_000)
    whole.unlink()
    assert (folder / "hf" / SHARD).is_file()
    (folder / "hf" / "README.md").write_text("# a card")
    (folder / "hf" / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"\x80" * 6000)
    (folder / "hf" / "transformer" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"x" * 6000)
    return folder / "hf"


@pytest.fixture
def hub(pipeline, monkeypatch, tmp_path):
    monkeypatch.setattr(download, "PAUSE", 0.01)
    monkeypatch.setattr(release, "WEIGHTS", tmp_path / "weights")
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with hub_server(pipeline, NAME) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def fetched(tmp_path: Path) -> dict[str, int]:
    """What lies in the folder of downloads, with sizes."""
    folder = tmp_path / "weights" / f"{NAME}.download"
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def test_a_model_is_fetched_converted_and_sampled_with_at_first_use(hub, pipeline, tmp_path, capsys, monkeypatch):
    hub.token, hub.failing = "hf_secret", 1
    monkeypatch.setenv("HF_TOKEN", hub.token)
    asked = ["--model", NAME, "--prompt", "a dog", "--num-frames", 1, "--steps", 2, "--output-dir", tmp_path / "out"]
    assert main(*asked, "--dry-run") == 2
    assert f"it comes by: python tools/get_weights.py {NAME}" in capsys.readouterr().err and not hub.asked
    assert main(*asked) == 0
    said = capsys.readouterr()
    assert re.search(rf"{NAME}: (\d+\.\d MiB) of \1 are fetched", said.err) and "hf_secret" not in said.out + said.err
    assert len(list((tmp_path / "out").rglob("*.mp4"))) == 1
    target = tmp_path / "weights" / NAME
    assert {p.name for p in target.iterdir()} == {"transformer", "vae", "t5-v1_1-xxl", "infer.yaml", "hub.json"}
    assert sorted(p.name for p in target.parent.iterdir()) == ["CogVideoX-2b"], "neither downloads nor locks are left"
    origin = json.loads((target / "hub.json").read_text())
    assert (origin["repository"], origin["commit"]) == (NAME, COMMIT) and VAE in origin["files"]
    paths = {path for path, _ in hub.asked}
    assert paths == set(origin["files"]) and not any(path.endswith((".bin", ".md")) or "fp16" in path for path in paths)
    assert hub.tokens == {"hub": {"Bearer hf_secret"}, "elsewhere": {None}}, "a token goes to the hub alone"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert main(*asked, "--skip-done") == 0, "what is here needs no network"
    assert run_file_of(str(target)) == target / "infer.yaml"


def test_breaks_go_on_from_where_they_were(hub, pipeline, tmp_path):
    hub.broken.update({VAE: 3, SHARD: 1})
    said: list[str] = []
    file = get_release(Wish(NAME, keep=True), said.append)
    assert file.is_file() and any("breaks off in the middle" in line for line in said)
    size, asked = (pipeline / VAE).stat().st_size, [span for path, span in hub.asked if path == VAE]
    assert asked == ["", f"bytes={size // 2}-", f"bytes={size // 2 + size // 4}-", asked[3]] and len(asked) == 4
    found = fetched(tmp_path)
    assert found == {path: (pipeline / path).stat().st_size for path in found} and VAE in found
    for path in found:
        assert (tmp_path / "weights" / f"{NAME}.download" / path).read_bytes() == (pipeline / path).read_bytes()


def test_a_server_without_ranges_begins_anew(hub, pipeline, tmp_path):
    hub.broken[VAE], hub.ranges = 2, False
    assert get_release(Wish(NAME), print).is_file()


def test_a_line_that_stays_broken_ends_with_what_has_come_and_the_way_by_hand(hub, pipeline, tmp_path):
    hub.broken[VAE] = 10**6
    with pytest.raises(HubError, match=rf"breaks off .* Without network: `hf download {NAME} .*convert_weight_hf2sat"):
        get_release(Wish(NAME), lambda _: None)
    (part,) = (path for path in fetched(tmp_path) if ".part-" in path)
    size = (pipeline / VAE).stat().st_size
    assert part.startswith(VAE) and size // 2 <= fetched(tmp_path)[part] < size
    hub.broken.clear(), hub.asked.clear()
    assert get_release(Wish(NAME), print).is_file()
    (span,) = (span for path, span in hub.asked if path == VAE)
    assert size // 2 <= int(span.removeprefix("bytes=").removesuffix("-")) < size


def test_a_killed_command_is_gone_on_with(hub, pipeline, tmp_path):
    hub.seconds = 0.02  # between 64 KiB
    env = environment() | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path)}
    line = [sys.executable, "tools/get_weights.py", NAME, "--output_path", str(tmp_path / "weights" / NAME)]
    process = subprocess.Popen(line, cwd=REPO, env=env, stderr=subprocess.PIPE)
    end = time.monotonic() + 60
    while not any(size > 1 << 19 for size in fetched(tmp_path).values()) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    begun = {path: size for path, size in fetched(tmp_path).items() if ".part-" in path}
    assert begun
    hub.seconds = 0.0
    hub.asked.clear()
    done = subprocess.run(line, cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_file() and done.stdout.strip().endswith("CogVideoX-2b/infer.yaml")
    resumed = {path: span for path, span in hub.asked if span}
    parts = {name.partition(".part-")[0]: size for name, size in begun.items()}
    whole = {path: (pipeline / path).stat().st_size for path in parts}
    assert resumed == {path: f"bytes={size}-" for path, size in parts.items() if 0 < size < whole[path]}


@pytest.mark.parametrize("killed_in", ["convert", "remove"])
def test_downloads_that_a_killed_command_left_go_with_the_next_one(hub, pipeline, tmp_path, monkeypatch, killed_in):
    """Ended behind the conversion, or in the middle of the cleaning up."""
    whole, downloads = getattr(release, killed_in), tmp_path / "weights" / f"{NAME}.download"

    def killed(*arguments):
        whole(arguments[0] / "vae" if killed_in == "remove" else arguments[0])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(release, killed_in, killed)
        with pytest.raises(KeyboardInterrupt):
            get_release(Wish(NAME), lambda _: None)
    hub.asked.clear()
    assert run_file_of(NAME, may_download=False).is_file() and downloads.is_dir()
    file = run_file_of(NAME)
    assert file.is_file() and not downloads.exists() and not hub.asked
    assert json.loads((file.parent / "hub.json").read_text())["commit"] == COMMIT


def test_downloads_that_are_to_be_kept_stay(hub, pipeline, tmp_path, monkeypatch):
    """Those that a command was asked for, also behind one that was killed and not asked for it; and those of others."""

    def killed(order):
        converted(order)
        raise KeyboardInterrupt

    converted = release.convert
    monkeypatch.setattr(release, "convert", killed)
    with pytest.raises(KeyboardInterrupt):
        get_release(Wish(NAME), lambda _: None)
    file = get_release(Wish(NAME, keep=True), print)
    record = json.loads((file.parent / "hub.json").read_text())
    assert record["files"].keys() == fetched(tmp_path).keys() and run_file_of(NAME) == file and fetched(tmp_path)
    del record["download_kept"]  # as earlier versions wrote it
    (file.parent / "hub.json").write_text(json.dumps(record))
    assert run_file_of(NAME) == file and fetched(tmp_path).keys() == record["files"].keys()


def test_damage_on_the_way_is_found_and_fetched_once_more(hub, tmp_path):
    hub.wrong.update({VAE: 1, "vae/config.json": 1})  # SHA-256, and git's SHA-1
    said: list[str] = []
    assert get_release(Wish(NAME), said.append).is_file()
    assert sum("It is fetched once more" in line for line in said) == 2


@pytest.mark.parametrize("path", [VAE, "transformer/config.json"])
def test_a_wrong_checksum_is_an_error_with_nothing_made(hub, tmp_path, path):
    hub.wrong[path] = 10**6
    with pytest.raises(HubError, match=rf"{path} came with the checksum [0-9a-f]{{16}}\.\.\., and the hub's list says"):
        get_release(Wish(NAME), lambda _: None)
    assert path not in fetched(tmp_path) and not (tmp_path / "weights" / NAME).exists()


def test_pointers_in_place_of_weights_are_named(hub, tmp_path):
    hub.pointers = {VAE}
    with pytest.raises(HubError, match=rf"a Git LFS pointer in place of {VAE} \(\d+\.\d MiB\)"):
        get_release(Wish(NAME), lambda _: None)
    assert VAE not in fetched(tmp_path)


def test_a_file_of_another_commit_with_the_same_size_is_fetched_again(hub, tmp_path, pipeline):
    hub.broken[SHARD] = 10**6
    with pytest.raises(HubError, match="breaks off"):
        get_release(Wish(NAME), print)
    earlier = tmp_path / "weights" / f"{NAME}.download" / VAE
    content = (pipeline / VAE).read_bytes()
    earlier.parent.mkdir(exist_ok=True)
    earlier.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    begun = earlier.with_name(f"{earlier.name}.part-{'0' * 16}")
    begun.touch()
    hub.broken.clear()
    said: list[str] = []
    get_release(Wish(NAME, keep=True), said.append)
    assert not begun.exists()
    assert earlier.read_bytes() == content and any("fetched anew" in line for line in said)


def test_a_file_that_lost_its_end_later_is_fetched_again(hub, tmp_path, pipeline):
    hub.wrong["model_index.json"] = 10**6
    with pytest.raises(HubError):
        get_release(Wish(NAME), lambda _: None)
    file = tmp_path / "weights" / f"{NAME}.download" / VAE
    if not file.is_file():  # it was on its way
        file.parent.mkdir(exist_ok=True)
        file.write_bytes((pipeline / VAE).read_bytes())
    os.truncate(file, 1000)
    hub.wrong.clear()
    assert get_release(Wish(NAME), lambda _: None).is_file()


@pytest.mark.parametrize(
    ("hidden", "words"),
    [
        ({SHARD}, f"it lacks {SHARD}. These are: zai-org"),
        ({"vae/config.json", VAE}, f"it lacks vae/config.json, {VAE}"),
        ({"tokenizer/spiece.model", "tokenizer/tokenizer.json"}, "it lacks tokenizer/spiece.model"),
    ],
)
def test_a_repository_that_is_not_whole(hub, hidden, words):
    hub.hidden = hidden
    with pytest.raises(HubError, match=words):
        get_release(Wish(NAME), lambda _: None)
    assert not hub.asked, "seen before anything is fetched"


def test_what_cannot_be_had_is_one_error(hub, tmp_path, monkeypatch, capsys):
    from tools.get_weights import main as tool

    def refused(*arguments: str) -> str:
        assert tool(list(arguments)) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said

    assert "has no zai-org/CogVideoX-9b" in (said := refused("zai-org/CogVideoX-9b")) and "models are: zai-org/" in said
    assert "is no model's name: write OWNER/NAME" in refused("../x")
    assert "--output_path is of one model" in refused(NAME, "a/b", "--output_path", "x")
    hub.token = "hf_secret"
    assert "wants a token: set HF_TOKEN" in refused(NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "The token may not read it" in (said := refused(NAME)) and "hf_wrong" not in said
    hub.token = None
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert "is there, and holds no infer.yaml" in refused(NAME, "--output_path", str(tmp_path / "full"))
    monkeypatch.setattr(
        "shutil.disk_usage", lambda _: os.terminal_size((0, 0)) and type("Usage", (), {"free": 1 << 20})
    )
    assert "not enough room" in refused(NAME) and not hub.asked
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in (said := refused(NAME)) and "Without network: `hf download" in said
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in (said := refused(NAME)) and "Without network: `hf download" in said
    monkeypatch.setenv("HF_ENDPOINT", "ftp://x")
    assert "must be an address like" in refused(NAME)


def test_names_from_the_list_lead_nowhere_else(hub):
    """Only names of a release are taken, whatever a server lists."""
    files = Hub(hub.endpoint).files(NAME, COMMIT)
    assert {
        f.path for f in wanted([*files, *(f.__class__("../../x.safetensors", 1, "0" * 64) for f in files[:1])], NAME)
    } == {f.path for f in files if not f.path.endswith((".bin", ".md")) and "fp16" not in f.path}
    assert {len(f.digest) for f in files if f.size > LARGE} == {64}
    with pytest.raises(SaveError):
        get_release(Wish(NAME, Path("/proc/none/x")), lambda _: None)


def test_a_model_s_name_serves_python_too(hub, tmp_path):
    from sgm import TextToVideo

    model = TextToVideo.from_config(model=NAME, overrides={"args.sampling_num_frames": 1})
    assert model("a dog", steps=2).record["load"] == str(tmp_path / "weights" / NAME / "transformer")


def test_the_second_of_two_commands_waits_for_the_first(hub):
    said: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        files = [task.result() for task in [pool.submit(get_release, Wish(NAME), said.append) for _ in range(2)]]
    paths = [path for path, _ in hub.asked]
    assert files[0] == files[1] and len(paths) == len(set(paths))
    assert sum("this one waits for it" in line for line in said) == 1


def test_one_that_waits_goes_on_after_one_that_found_nothing(tmp_path):
    """Which takes the folders away again that it had made."""
    target, waits = tmp_path / "a" / "b" / "model", threading.Event()

    def second() -> None:
        with release.alone(target, NAME, lambda _: waits.set()):
            target.mkdir()

    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(HubError), release.alone(target, NAME, print):
            going = pool.submit(second)
            assert waits.wait(30)
            raise HubError("nothing")
        going.result()
    assert target.is_dir()
