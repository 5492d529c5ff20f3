"""Converters on adapters: there and back, with the factor in them or stated, folded into a base, few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sgm.convert.to_hf import ToHf, convert, export_lora
from sgm.convert.to_sat import ToSat, import_lora
from sgm.convert.to_sat import convert as convert_back
from sgm.modules.diffusionmodules.few_steps import FewSteps
from sgm.weights.release import NETWORK_PREFIX, Adapter, read_transformer
from sgm.weights.save import save_pt, save_safetensors
from tests.convert_tiny import adapter_matrices
from tests.dit_tiny import merged_state

FEW_STEPS = {"steps": 4, "timesteps": [999, 749, 499, 249], "sampler": "renoise", "guidance": False}


@pytest.fixture(scope="module")
def hf(sat_release: Path, sat_yaml: Path) -> Path:
    convert(
        ToHf(sat_release.parent / "hf", sat_release / "transformer", partial=True, config=sat_yaml, dtype=torch.float32)
    )
    return sat_release.parent / "hf"


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.mark.parametrize("rank", [128, 256])
def test_adapters_of_42_layers_there_and_back(rank: int, tmp_path: Path) -> None:
    matrices = adapter_matrices(rank=rank, layers=42, width=64)
    save_pt(tmp_path / "a.pt", {"module": matrices, "lora": {"rank": rank, "alpha": 1.0}})
    assert len(matrices) == 336
    export_lora(ToHf(tmp_path / "hf", tmp_path / "a.pt"), fold_scale=False)
    assert len(load_file(tmp_path / "hf" / "pytorch_lora_weights.safetensors")) == 336
    import_lora(ToSat(tmp_path / "hf", tmp_path / "back"))
    back = read_transformer(tmp_path / "back")
    same(back.network, {n.removeprefix(NETWORK_PREFIX): t for n, t in matrices.items()})
    assert (back.lora["rank"], back.lora["alpha"]) == (rank, 1.0)


def test_adapter_folded_in_on_the_way_back(hf: Path, sat_release: Path, tmp_path: Path) -> None:
    save_pt(tmp_path / "a.pt", {"module": adapter_matrices(), "lora": {"rank": 4, "alpha": 2.0}})
    convert_back(ToSat(hf, tmp_path / "sat", partial=True, adapters=[Adapter(str(tmp_path / "a.pt"), 0.5)]))
    matrices = {n.removeprefix(NETWORK_PREFIX): t for n, t in adapter_matrices().items()}
    expected = merged_state(read_transformer(sat_release / "transformer").network | matrices, 0.5, alpha=2.0)
    found = read_transformer(tmp_path / "sat" / "transformer").network
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)


def test_what_was_distilled_for_few_steps_stays_so(sat_release: Path, sat_yaml: Path, tmp_path: Path) -> None:
    """Whole weights, and a student that is folded into others, to diffusers and back."""
    content = torch.load(sat_release / "transformer" / "1000" / "mp_rank_00_model_states.pt", weights_only=True)
    save_pt(tmp_path / "whole.pt", content | {"lora": {"few_steps": FEW_STEPS}})
    student = {"rank": 4, "alpha": 2.0, "few_steps": json.dumps(FEW_STEPS)}
    save_pt(tmp_path / "student.pt", {"module": adapter_matrices(), "lora": student})
    for name, source, adapters in (
        ("whole", tmp_path / "whole.pt", []),
        ("folded", sat_release / "transformer", [Adapter(str(tmp_path / "student.pt"))]),
    ):
        lines = convert(
            ToHf(tmp_path / name, source, partial=True, config=sat_yaml, adapters=adapters, shard_bytes=1 << 20)
        )
        assert any("stays in the header; diffusers does not heed it" in line for line in lines)
        convert_back(ToSat(tmp_path / name, tmp_path / f"{name}-sat", partial=True))
        stated = read_transformer(tmp_path / f"{name}-sat" / "transformer").lora["few_steps"]
        assert FewSteps.parse(stated) == FewSteps.parse(FEW_STEPS)
    other = student | {"few_steps": FEW_STEPS | {"steps": 2, "timesteps": [999, 499]}}
    save_pt(tmp_path / "other.pt", {"module": adapter_matrices(), "lora": other})
    folded = [Adapter(str(tmp_path / "other.pt"))]
    with pytest.raises(ValueError, match="distilled in different ways"):
        convert(ToHf(tmp_path / "x", tmp_path / "whole.pt", partial=True, config=sat_yaml, adapters=folded))


def test_adapter_there_and_back_is_bit_exact(tmp_path: Path) -> None:
    matrices = {name: t.half() for name, t in adapter_matrices(rank=3, layers=5).items()}
    save_pt(tmp_path / "a.pt", {"module": matrices, "lora": {"rank": 3, "alpha": 1.0}})
    export_lora(ToHf(tmp_path / "hf", tmp_path / "a.pt"), fold_scale=False)
    from safetensors import safe_open

    with safe_open(tmp_path / "hf" / "pytorch_lora_weights.safetensors", "pt") as file:
        facts = file.metadata()
        assert len(file.keys()) == 5 * 8
    assert facts["rank"] == "3" and float(facts["alpha"]) == 1.0
    stated = json.loads(facts["lora_adapter_metadata"])
    assert stated["transformer.r"] == 3 and stated["transformer.lora_alpha"] == 1.0
    lines = import_lora(ToSat(tmp_path / "hf", tmp_path / "sat"))
    back = torch.load(tmp_path / "sat" / "1000" / "mp_rank_00_model_states.pt", weights_only=True)
    same(back["module"], matrices)
    assert back["lora"]["alpha"] == 1.0 and back["lora"]["rank"] == 3 and "alpha 1 (stated in the file)," in lines[0]


@pytest.mark.parametrize("end", ["safetensors", "bin"])
def test_adapter_of_peft_for_upstreams_alpha(tmp_path: Path, end: str) -> None:
    """A file that says nothing has PEFT's scaling 1; written for alpha 1, SAT's 1 / r must give the same product."""
    save_pt(tmp_path / "a.pt", {"module": adapter_matrices(rank=4)})
    export_lora(ToHf(tmp_path / "hf", tmp_path / "a.pt"), fold_scale=False)
    silent = load_file(tmp_path / "hf" / "pytorch_lora_weights.safetensors")
    (tmp_path / "silent").mkdir()
    file = tmp_path / "silent" / f"pytorch_lora_weights.{end}"
    (save_safetensors if end == "safetensors" else lambda path, state: torch.save(state, path))(file, silent)
    line, *_ = import_lora(ToSat(file.parent, tmp_path / "sat", sat_alpha=1.0))
    assert "alpha 4 (assumed, the file does not say), scaled for alpha 1" in line
    stored = read_transformer(tmp_path / "sat")
    assert stored.lora["alpha"] == 1.0
    name = "transformer.layers.1.attention.dense.matrix_{}.0"
    product = stored.network[name.format("B")] @ stored.network[name.format("A")] / 4
    peft = "transformer.transformer_blocks.1.attn1.to_out.0.lora_{}.weight"
    torch.testing.assert_close(product, silent[peft.format("B")] @ silent[peft.format("A")])


def test_stabilised_scaling_and_stated_alpha_go_along(tmp_path: Path) -> None:
    facts = {"rank": 4, "alpha": 8.0, "rank_stabilised": True}
    save_pt(tmp_path / "a.pt", {"module": adapter_matrices(rank=4), "lora": facts})
    lines = export_lora(ToHf(tmp_path / "hf", tmp_path / "a.pt"), fold_scale=False)
    assert "scaling 4," in lines[0]
    import_lora(ToSat(tmp_path / "hf", tmp_path / "sat"))
    stored = read_transformer(tmp_path / "sat").lora
    assert (stored["alpha"], stored["rank_stabilised"]) == (8.0, True)
