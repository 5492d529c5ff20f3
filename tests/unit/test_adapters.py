"""Which adapters a run samples with: the student under few_steps, however it is spelt, and none of them twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sgm.config import ConfigError, load_run_config
from sgm.convert.to_hf import ToHf, export_lora
from sgm.hub import download, release
from sgm.hub.adapter import choose_file
from sgm.hub.client import HubError, _file
from sgm.inference.adapters import read_adapter, with_adapters, with_fetched
from sgm.inference.grid import comparison_of
from sgm.inference.options import SampleArgs
from sgm.inference.pipeline import Pipeline
from sgm.weights.preflight import with_found_paths
from tests.hub_server import hub_server

REPO = Path(__file__).resolve().parents[2]
FILES = [REPO / "configs" / name for name in ("demo_infer.yaml", "few_steps.yaml")]
STUDENT = REPO / "demo" / "student"


def config(**flags):
    return with_found_paths(load_run_config(FILES, SampleArgs, flags=flags))


def test_the_student_counts_wherever_a_model_is_built(monkeypatch):
    monkeypatch.chdir(REPO)
    pipeline = Pipeline(load_run_config(FILES, SampleArgs), torch.device("cpu"), with_text_encoder=False)
    assert (pipeline.num_steps, pipeline.args.lora) == (4, ["demo/student"])


@pytest.mark.parametrize(
    "spelt", [STUDENT, f"{STUDENT}/", STUDENT / "lora.safetensors", f"{STUDENT}:0.5", "demo/student"]
)
def test_a_student_that_is_named_is_not_added_again(spelt, tmp_path, monkeypatch):
    """Also from a folder where only the project's demo is found."""
    for folder in (REPO, tmp_path):
        monkeypatch.chdir(folder)
        run = with_adapters(config(lora=[str(spelt)]))
        assert len(run.args.lora) == 1 and with_adapters(run) == run
        assert with_adapters(load_run_config(FILES, SampleArgs, flags={"lora": [str(spelt)]})).args.lora == [str(spelt)]
    run = with_adapters(config(lora=["other"]))
    assert run.args.lora == [str(STUDENT), "other"] and with_adapters(run) == run


def test_no_adapter_counts_twice(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(STUDENT)
    with pytest.raises(ConfigError, match=f"{STUDENT} and {tmp_path}/link:0.5 are the same adapter.*name it once"):
        with_adapters(config(lora=[str(STUDENT), "other", f"{tmp_path}/link:0.5"]))
    with pytest.raises(ConfigError, match="absent and absent are the same adapter"):
        with_adapters(config(lora=["absent", "absent"]))
    for folder in ("run/6", "run/merged/6", "other/6"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "mp_rank_00_model_states.pt").touch()
        (tmp_path / folder).with_name("latest").write_text("6")
    for load, lora in (("run", "run/6:0.5"), ("run/merged", "run"), ("run/merged/6", "run/6")):
        with pytest.raises(
            ConfigError, match=f"args.lora names .*{lora}, which args.load \\({tmp_path / load}\\) holds already"
        ):
            with_adapters(config(load=str(tmp_path / load), lora=[str(tmp_path / lora)]))
    (tmp_path / "merged/6").mkdir(parents=True)  # beside a folder of adapters, of no run
    (tmp_path / "merged/6/mp_rank_00_model_states.pt").touch()
    for load, lora in (("run/merged", "other"), ("merged/6", "loras/x.safetensors")):
        other = config(load=str(tmp_path / load), lora=[str(tmp_path / lora)], few_steps=False)
        assert with_adapters(other) == other
    monkeypatch.setattr("sgm.convert.lora_files.read_checkpoint", None)  # gigabytes of a base are not read for it
    with_adapters(config(load=str(tmp_path / "merged/6/mp_rank_00_model_states.pt")))


def test_decoding_needs_no_student():
    flags = {"decode_latents": "l", "lora": ["a", "a"]}
    assert not with_adapters(config(**flags)).args.few_steps


def test_a_scale_does_not_hide_a_path(tmp_path, monkeypatch):
    """Also where the project's folder is another one, as of an installed package."""
    (tmp_path / "project" / "adapters" / "a").mkdir(parents=True)
    monkeypatch.setattr("sgm.places.PROJECT", tmp_path / "project")
    monkeypatch.chdir(tmp_path)
    found = config(lora=["adapters/a:0.5", "adapters/a", "other:2"]).args.lora
    assert found == [f"{tmp_path}/project/adapters/a:0.5", f"{tmp_path}/project/adapters/a", "other:2"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository with a student in diffusers' form, and nothing of it here."""
    export_lora(ToHf(tmp_path / "repository", STUDENT))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(release, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(download, "PAUSE", 0.01)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with hub_server(tmp_path / "repository", "someone/style") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


FILE = "pytorch_lora_weights.safetensors"


def _in_the_library_s_cache(cache, monkeypatch):
    """What lies there is not used: it is another file, and its settings are missing."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    repository = cache / "models--someone--style"
    for folder, name, content in (("refs", "main", "0" * 40), (f"snapshots/{'0' * 40}", FILE, "damaged")):
        (repository / folder).mkdir(parents=True)
        (repository / folder / name).write_text(content)


def fetched(asked):
    return with_adapters(with_fetched(asked))


def test_an_adapter_of_the_hub_is_fetched_once(hub, tmp_path, monkeypatch):
    """Whole, though its first answer breaks off; whoever names it again asks nobody."""
    hub.broken[FILE] = 1
    _in_the_library_s_cache(tmp_path / "cache", monkeypatch)
    folder = tmp_path / "weights" / "adapters" / "someone" / "style"
    for name in ("someone/style:0.5", f"someone/style/{FILE}:0.5"):
        assert fetched(config(lora=[name])).args.lora[1:] == [f"{folder / FILE}:0.5"]  # behind the student
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "few_steps" in read_adapter(str(folder)).lora
    with pytest.raises(HubError, match="HF_HUB_OFFLINE .*hf download someone/other --local-dir FOLDER"):
        fetched(config(lora=["someone/other"]))


def test_the_settings_beside_an_adapter_come_with_it_and_before_it(hub, tmp_path):
    """From the adapter's own folder: the factor depends on them."""
    folder = tmp_path / "repository" / "checkpoint-2"
    folder.mkdir()
    (tmp_path / "repository" / FILE).rename(folder / FILE)
    (tmp_path / "repository" / "adapter_config.json").write_text('{"lora_alpha": 1}')
    (folder / "adapter_config.json").write_text('{"lora_alpha": 2}')
    (found,) = fetched(config(lora=["someone/style/checkpoint-2/" + FILE])).args.lora[1:]
    assert json.loads((Path(found).parent / "adapter_config.json").read_text()) == {"lora_alpha": 2}
    assert [path for path, _ in hub.asked] == ["checkpoint-2/adapter_config.json", f"checkpoint-2/{FILE}"]


def test_a_list_of_the_hub_names_nothing_outside():
    for path in ("../../x.safetensors", "/x.safetensors"):
        with pytest.raises(HubError, match="outside the repository"):
            _file({"path": path, "size": 1, "oid": "0" * 40})


def test_factors_of_a_comparison_leave_the_student_as_it_is():
    asked = fetched(config(lora=["other:2"], prompts=["a"]))
    student, _ = asked.args.lora
    _, (_, axis) = comparison_of(["lora=0,0.5,third"], asked)
    assert [value.asked["lora"] for value in axis.values] == [[student], [student, "other:1"], [student, "third"]]
    _, (_, axis) = comparison_of(["lora=1/x.pt,2/x.pt"], asked)
    assert [value.label for value in axis.values] == ["lora 1/x.pt", "lora 2/x.pt"], "told apart"


def test_an_adapter_that_the_hub_does_not_have(hub, tmp_path):
    with pytest.raises(HubError, match="has no someone/other"):
        fetched(config(lora=["someone/other"]))
    assert not (tmp_path / "weights").exists(), "nothing stays of what there is not"
    with pytest.raises(HubError, match=f"has no file a.safetensors; its files: .*{FILE}"):
        fetched(config(lora=["someone/style/a.safetensors"]))
    Path("ckpts").mkdir()
    assert fetched(config(lora=["ckpts/other"])).args.lora[1:] == ["ckpts/other"]  # a part is here: a path
    files = ["README.md", "a.safetensors", "b.safetensors"]
    with pytest.raises(HubError, match="2 .safetensors files; name one: --lora x/y/a.safetensors; --lora x/y/b"):
        choose_file("x/y", files)
    assert choose_file("x/y", files[:2]) == "a.safetensors"
    assert choose_file("x/y", [*files, FILE]) == FILE
