"""Reading weights: safe, strict, lean; every wrong file named with its remedy."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sgm.weights import WeightsError, WeightsNotFoundError, assign_state, read_checkpoint, weights_fingerprint
from sgm.weights.files import tensors_of
from sgm.weights.identify import fitting_configs, transformer_shape, what_is
from sgm.weights.release import locate, read_transformer
from tools.describe_weights import inspect

REPO = Path(__file__).resolve().parents[2]
PART = "mp_rank_00_model_states.pt"
STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


# --- one file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_every_format_is_read(tmp_path, kind):
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "zip")
    read = read_checkpoint(path)
    assert read.keys() == STATE.keys() and all(torch.equal(read[k], v) for k, v in STATE.items())


def test_random_states_of_old_checkpoints_are_read(tmp_path):
    """As the original saves them: NumPy's, Python's and torch's states beside the weights."""
    content = {"module": STATE, "np_rng_state": np.random.get_state(), "random_rng_state": random.getstate(),
               "torch_rng_state": torch.get_rng_state(), "iteration": 3, "ds_config": {"lr": 1e-3, "on": True}}  # fmt: skip
    torch.save(content, tmp_path / "w.pt")
    read = read_checkpoint(tmp_path / "w.pt")
    assert read["iteration"] == 3 and np.array_equal(read["np_rng_state"][1], np.random.get_state()[1])
    data = (tmp_path / "w.pt").read_bytes()
    assert b"numpy._core" in data or b"numpy.core" in data
    assert tensors_of(read).keys() == {"torch_rng_state"}


class Touch:
    """A pickle of this makes a file when it is loaded without restriction."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mknod, (str(self.mark),)


class Evaluate:
    def __reduce__(self):
        return eval, ("1 + 1",)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("make", [Touch, lambda mark: Evaluate()], ids=["os", "eval"])
def test_code_in_a_file_does_not_run(tmp_path, legacy, make):
    mark, path = tmp_path / "mark", tmp_path / "w.pt"
    torch.save({"module": STATE, "x": make(mark)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(WeightsError, match="was not loaded: it contains the pickled object '.+'.*run code"):
        read_checkpoint(path)
    assert not mark.exists()


def test_plain_pickle_of_code_does_not_run(tmp_path):
    (tmp_path / "w.pt").write_bytes(pickle.dumps(Touch(tmp_path / "mark")))
    with pytest.raises(WeightsError):
        read_checkpoint(tmp_path / "w.pt")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("keep", [0, 3, 60, -1, -40])
def test_truncated_files_are_named(tmp_path, name, keep):
    path = tmp_path / name
    save_file(STATE, path) if name.endswith("s") else torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=f"{name} cannot be read as weights.*copy or download it again"):
        read_checkpoint(path)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(WeightsNotFoundError, match="no weight file at .*absent.pt"):
        read_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(WeightsError, match="is a folder"):
        read_checkpoint(tmp_path)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(WeightsError, match="holds a list"):
        read_checkpoint(tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("<html>404</html>")
    with pytest.raises(WeightsError, match="text.pt cannot be read"):
        read_checkpoint(tmp_path / "text.pt")


def test_zip_files_are_mapped_not_copied(tmp_path):
    """A change to a private mapping does not reach the file, and reading touches little memory."""
    torch.save({"w": torch.zeros(1 << 20)}, tmp_path / "w.pt")
    before = (tmp_path / "w.pt").read_bytes()
    read = read_checkpoint(tmp_path / "w.pt")["w"]
    maps = Path("/proc/self/maps").read_text()
    assert str(tmp_path / "w.pt") in maps
    read += 1
    assert (tmp_path / "w.pt").read_bytes() == before


def test_fingerprints_tell_files_apart(tmp_path):
    for name, value in (("a", 0.0), ("b", 0.0), ("c", 1.0)):
        torch.save({"w": torch.full((1000,), value)}, tmp_path / name)
    a, b, c = (weights_fingerprint(tmp_path / n) for n in "abc")
    assert len(a) == 16 and a != c and weights_fingerprint(tmp_path / "a") == a
    (tmp_path / "b").write_bytes((tmp_path / "a").read_bytes())
    assert weights_fingerprint(tmp_path / "b") == a


# --- the release's folders -----------------------------------------------------------------------------------------


def network_state(width: int = 8, layers: int = 2) -> dict[str, torch.Tensor]:
    return {
        "mixins.patch_embed.proj.weight": torch.zeros(width, 16, 2, 2),
        "mixins.patch_embed.text_proj.weight": torch.zeros(width, 4),
        **{f"transformer.layers.{k}.attention.dense.bias": torch.zeros(width) for k in range(layers)},
    }


def save_part(folder: Path, state: dict | None = None, part: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"module": {f"model.diffusion_model.{k}": v for k, v in (state or network_state()).items()}}
    torch.save(content, folder / f"mp_rank_{part:02d}_model_states.pt")
    return folder / f"mp_rank_{part:02d}_model_states.pt"


@pytest.mark.parametrize(("latest", "folder"), [("1000", "1000"), ("release", "release"), (" 7-ema\n", "7-ema")])
def test_release_folder_iteration_folder_and_file(tmp_path, latest, folder):
    file = save_part(tmp_path / folder)
    (tmp_path / "latest").write_text(latest)
    expected = None if folder == "release" else int(folder.removesuffix("-ema"))
    for path in (tmp_path, tmp_path / folder, file):
        assert locate(path) == ([file], expected)
    assert read_transformer(tmp_path).network.keys() == network_state().keys()


def write_iteration(run: Path, number: int) -> None:
    """As training does: complete under its name, then `latest`, then the earlier one moved away and deleted."""
    (run / ".partial-new").mkdir()
    torch.save({"module": {"transformer.x": torch.full((500,), float(number))}}, run / ".partial-new" / PART)
    (run / ".partial-new").rename(run / str(number))
    (run / ".partial-latest").write_text(str(number))
    (run / ".partial-latest").replace(run / "latest")
    if number > 1:
        (run / str(number - 1)).rename(run / ".partial-old")
        shutil.rmtree(run / ".partial-old")


def test_a_run_that_saves_and_deletes_all_the_time_is_read_and_described(tmp_path):
    write_iteration(tmp_path, 1)
    over = threading.Event()

    def train() -> None:
        number = 1
        while not over.is_set():
            number += 1
            write_iteration(tmp_path, number)
            time.sleep(0.01)  # it is to delete while files are read, not to keep them from being read at all

    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train)
        try:
            for _ in range(40):
                read = read_transformer(tmp_path)
                assert read.network["transformer.x"].eq(float(read.iteration or 0)).all()
                assert inspect(tmp_path)[0].digest
        finally:
            over.set()
        training.result()
    assert read.iteration > 5


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_file_that_is_deleted_between_check_and_reading(tmp_path, monkeypatch, name):
    save_file(STATE, tmp_path / name) if name.endswith("s") else torch.save(STATE, tmp_path / name)
    monkeypatch.setattr("sgm.weights.files.check", lambda path, submit: path.unlink())
    with pytest.raises(WeightsNotFoundError, match=f"no weight file at .*{name}.*the run's folder"):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("step", ["locate", "read_checkpoint"])
def test_a_checkpoint_that_is_deleted_while_it_is_read(tmp_path, monkeypatch, step):
    """Before it is opened or afterwards: the run's next one is taken; one that was named itself is an error."""
    from sgm.weights import release

    original, numbers = getattr(release, step), iter(range(2, 9))

    def meanwhile(path):
        found = original(path) if step == "locate" else None
        write_iteration(tmp_path, next(numbers))
        return found or original(path)

    write_iteration(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(release, step, lambda path: patch.undo() or meanwhile(path))
        assert read_transformer(tmp_path).iteration == 2
    with (
        monkeypatch.context() as patch,
        pytest.raises(WeightsNotFoundError, match="at .*/2.*the run's folder"),
    ):
        patch.setattr(release, step, lambda path: patch.undo() or meanwhile(path))
        read_transformer(tmp_path / "2")
    with pytest.raises(WeightsNotFoundError, match="no weight file at .*the run's folder"):
        weights_fingerprint(tmp_path / "2" / PART)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, "no `latest` and no mp_rank_00"),
        (lambda p: (p / "latest").write_text("0"), "reads '0'"),
        (lambda p: (p / "latest").write_text("soon"), "reads 'soon'"),
        (lambda p: (p / "latest").write_text("5"), "names '5', but there is no folder"),
        (lambda p: [(p / "latest").write_text("5"), (p / "5").mkdir()], "has no mp_rank_00"),
        (lambda p: save_part(p / "5"), "name one of its iterations .5."),
        (lambda p: (p / "z3_rank_00_model_states.pt").touch(), "ZeRO-3 partitions"),
        (lambda p: (p / "model_index.json").touch(), "convert_weight_hf2sat"),
        (lambda p: save_part(p, part=1), "parts 0 to 1 must all be there"),
    ],
)
def test_folders_that_are_no_checkpoint_say_what_they_are(tmp_path, make, words):
    make(tmp_path)
    with pytest.raises(WeightsError, match=words):
        locate(tmp_path)


def test_entries_of_other_parts_are_set_aside_and_foreign_ones_refused(tmp_path):
    state = {f"model.diffusion_model.{k}": v for k, v in network_state().items()}
    state |= {"conditioner.x": torch.zeros(1), "first_stage_model.y": torch.zeros(1)}
    torch.save({"module": state, "iteration": 9}, tmp_path / "whole.pt")
    whole = read_transformer(tmp_path / "whole.pt")
    assert set(whole.others) == {"conditioner.x", "first_stage_model.y"} and whole.iteration == 9
    torch.save(network_state(), tmp_path / "bare.pt")  # without prefix
    assert read_transformer(tmp_path / "bare.pt").network.keys() == whole.network.keys()
    for name, found in (
        ("transformer_blocks.0.x", "diffusers transformer; convert"),
        ("encoder.down.0.x", "3D VAE"),
        ("encoder.block.0.x", "T5 text encoder"),
        ("who.knows", "unknown weights"),
    ):
        torch.save({name: torch.zeros(1)}, tmp_path / "foreign.pt")
        with pytest.raises(WeightsError, match=found):
            read_transformer(tmp_path / "foreign.pt")


# --- which model is it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "layers", "patch", "rows", "family", "config"),
    [
        (1920, 30, (16, 2, 2), 64, "CogVideoX-2B", "cogvideox_2b"),
        (3072, 42, (16, 2, 2), 64, "CogVideoX-5B", "cogvideox_5b"),
        (3072, 42, (64,), 64, "CogVideoX-5B", "cogvideox_5b"),
        (3072, 42, (32, 2, 2), 64, "CogVideoX-5B-I2V", "cogvideox_5b_i2v"),
        (3072, 42, (128,), 64, "CogVideoX-5B-I2V", "cogvideox_5b_i2v"),  # the original's later form
        (3072, 42, (128,), 128, "CogVideoX1.5-5B", "cogvideox1.5_5b"),
        (3072, 42, (256,), 128, "CogVideoX1.5-5B-I2V", "cogvideox1.5_5b_i2v"),
        (3072, 42, (128,), None, "a transformer of width 3072 with 42 layers", ""),
        (64, 3, (16, 2, 2), 64, "width 64 with 3 layers", ""),
    ],
)
def test_published_models_are_recognised(width, layers, patch, rows, family, config):
    state = published_state(width, layers, patch, rows)
    assert f"{family} (width" in what_is(state) and transformer_shape(state).num_layers == layers
    fits = [Path(p).name for p in fitting_configs(state, REPO / "configs")]
    assert fits == ([f"{config}_infer.yaml", f"{config}_sft.yaml"] if config else [])


def published_state(width: int, layers: int, patch: tuple[int, ...], rows: int | None) -> dict[str, torch.Tensor]:
    ends = {"patch_embed.proj": (width, *patch), "patch_embed.text_proj": (width, 4096)}
    ends |= {"final_layer.linear": (rows, width)} if rows else {}
    shapes = {f"mixins.{name}.weight": torch.empty(shape, device="meta") for name, shape in ends.items()}
    return network_state(1, layers) | shapes


def test_what_holds_no_transformer_is_named():
    assert what_is({"x.matrix_A.0": torch.zeros(1)}) == "a LoRA adapter without base weights"
    assert "unknown weights (0 tensors)" in what_is({}) and transformer_shape({}) is None
    assert fitting_configs({}, REPO / "configs") == []


# --- assignment ----------------------------------------------------------------------------------------------------


def layer(device: str = "cpu") -> nn.Module:
    with torch.device(device):
        return nn.ModuleDict({"a": nn.Linear(3, 2)})


def test_all_problems_are_listed_and_nothing_is_assigned():
    module = layer()
    before = module["a"].bias.clone()
    state = {"a.weight": torch.zeros(2, 4), "b.bias": torch.ones(2), **{f"c.{k}": torch.ones(1) for k in range(9)}}
    with pytest.raises(WeightsError) as error:
        assign_state(module, state, source="file.pt", hint="A hint.")
    text = str(error.value)
    assert "file.pt does not fit ModuleDict" in text and "missing from the file (1): a.bias" in text
    assert "not of this model (10)" in text and "and 4 more" in text and text.endswith("A hint.")
    assert "a.weight is [2, 4] in the file, [2, 3] in the model" in text
    assert torch.equal(module["a"].bias, before)


def test_meta_modules_take_the_files_tensors_themselves():
    module = layer("meta")
    assign_state(module, STATE, source="x")
    assert module["a"].weight.data_ptr() == STATE["a.weight"].data_ptr() and module["a"].weight.requires_grad
    half = layer("meta")
    assign_state(half, STATE, source="x", dtype=torch.float16)
    assert half["a"].weight.dtype == torch.float16


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "bad, dtype, words",
    [(math.nan, None, "float32"), (-math.inf, torch.bfloat16, "bfloat16"), (1e6, torch.float16, "float16")],
)
def test_values_that_are_not_finite_are_refused(device, bad, dtype, words):
    """Also those that only the wanted type cannot hold."""
    state = {name: value.clone() for name, value in STATE.items()}
    state["a.weight"][1, 2] = bad
    with pytest.raises(WeightsError) as caught:
        assign_state(layer(device), state, source="file.pt", dtype=dtype)
    assert str(caught.value).startswith(
        f"file.pt: a.weight is not finite, 1 of 6 values are NaN or infinite in {words}"
    )


def test_real_modules_are_filled_in_place():
    module = layer()
    place = module["a"].weight.data_ptr()
    assign_state(module, STATE, source="x")
    assert module["a"].weight.data_ptr() == place and torch.equal(module["a"].weight, STATE["a.weight"])


def test_ties_marks_ignored_prefixes_and_allowed_absence():
    with torch.device("meta"):
        module = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
        module["b"].weight = module["a"].weight
        module["a"].weight.mark = "kept"
    state = STATE | {"b.weight": STATE["a.weight"], "loss.x": torch.ones(1)}
    assign_state(module, state, source="x", may_lack=["b.bias"], ignore_prefixes=["loss"])
    assert module["a"].weight is module["b"].weight and module["a"].weight.mark == "kept"
    assert module["b"].bias.is_meta


def test_random_release_folder_is_whole(tmp_path, capsys):
    """tools/make_weights.py: every key of the configuration's parts, in the release's layout, refused a second time."""
    from tests.training_tiny import model_section, write_yaml
    from tools.make_weights import main

    config = write_yaml(tmp_path / "c.yaml", {"model": model_section(tmp_path)})
    assert main(["--config", str(config), "--out", str(tmp_path / "w"), "--dtype", "bf16"]) == 0
    assert (tmp_path / "w/transformer/latest").read_text() == "1000"
    read = read_transformer(tmp_path / "w/transformer")
    assert read.iteration == 1000 and {t.dtype for t in read.network.values()} == {torch.bfloat16}
    assert not any("pos_embedding" in n for n in read.network)
    names = {p.name for p in (tmp_path / "w/t5").iterdir()}
    assert {"config.json", "spiece.model", "model.safetensors.index.json", "tokenizer_config.json"} <= names
    assert "tokenizer.json" not in names and len(names) == 8
    index = json.loads((tmp_path / "w/t5/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 2
    assert main(["--config", str(config), "--out", str(tmp_path / "w")]) == 2
    assert "exists already" in capsys.readouterr().err
