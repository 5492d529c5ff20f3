"""Position tables and patches: formulas, order, limits."""

from __future__ import annotations

import math

import pytest
import torch

from sgm.modules.ops.block_ops import RotaryTable, rotate
from sgm.modules.transformer.block import TokenGrid
from sgm.modules.transformer.patch_embed import PatchSize, unpatchify
from sgm.modules.transformer.positions import (
    Basic3DPositionEmbeddingMixin,
    Rotary3DPositionEmbeddingMixin,
    rotary_table,
    sincos_table,
)

GRID = TokenGrid(3, 4, 5)


def sine_mixin(**changes: float) -> Basic3DPositionEmbeddingMixin:
    mixin = Basic3DPositionEmbeddingMixin(
        height=4, width=5, compressed_num_frames=3, hidden_size=32, text_length=7, **changes
    )
    mixin.reinit()
    return mixin


def rotary_mixin(**changes: bool) -> Rotary3DPositionEmbeddingMixin:
    mixin = Rotary3DPositionEmbeddingMixin(
        height=4, width=5, compressed_num_frames=3, hidden_size=32, hidden_size_head=16, text_length=7, **changes
    )
    mixin.reinit()
    return mixin


def test_a_row_of_the_sine_table_by_hand() -> None:
    """Time, then column, then row of the token; each axis sines first."""
    table = sincos_table(GRID, 32, (1.0, 2.0, 4.0)).unflatten(0, GRID)
    t, h, w = 2, 3, 4

    def axis(position: float, width: int) -> list[float]:
        angles = [position / 10000 ** (i / (width / 2)) for i in range(width // 2)]
        return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]

    expected = axis(t, 8) + axis(w / 4, 12) + axis(h / 2, 12)
    assert table[t, h, w].tolist() == pytest.approx(expected, abs=1e-12)


def test_a_row_of_the_rotary_table_by_hand() -> None:
    """Time, then row, then column of the token (unlike the sine table); neighbours share an angle."""
    table = rotary_table(GRID, 32)
    t, h, w = 2, 3, 4
    angles = [
        position / 10000 ** (2 * i / width)
        for position, width in ((t, 8), (h, 12), (w, 12))
        for i in range(width // 2)
        for _ in range(2)
    ]
    row = (t * 4 + h) * 5 + w
    assert table.cos[row].tolist() == pytest.approx([math.cos(a) for a in angles], abs=1e-6)
    assert table.sin[row].tolist() == pytest.approx([math.sin(a) for a in angles], abs=1e-6)


def test_rotation_turns_adjacent_pairs_and_keeps_lengths() -> None:
    angle = torch.tensor([0.3, 0.3, 1.1, 1.1])
    x = torch.randn(2, 1, 3, 4)
    out = rotate(x, RotaryTable(angle.cos()[None], angle.sin()[None]))
    pairs = torch.view_as_complex(x.unflatten(-1, (2, 2)).contiguous()) * torch.polar(torch.ones(2), angle[::2])
    torch.testing.assert_close(out, torch.view_as_real(pairs).flatten(-2))
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))


def test_products_of_rotated_vectors_depend_on_distance_only() -> None:
    table = rotary_table(TokenGrid(1, 1, 9), 16)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    turned = [[rotate(v, RotaryTable(*(part[i : i + 1] for part in table))) for i in range(9)] for v in (q, k)]
    products = [[float((turned[0][i] * turned[1][j]).sum()) for j in range(9)] for i in range(9)]
    assert products[2][5] == pytest.approx(products[4][7], abs=1e-5)
    assert products[2][5] != pytest.approx(products[2][6], abs=1e-3)


def test_text_has_no_position_and_fewer_frames_take_the_first_rows() -> None:
    mixin = sine_mixin()
    whole = mixin(GRID)
    assert whole.shape == (1, 7 + 60, 32) and not whole[:, :7].any() and whole[:, 7:].any()
    assert torch.equal(mixin(TokenGrid(1, 4, 5)), whole[:, :27])


def test_other_grids_keep_the_spacing() -> None:
    mixin = sine_mixin(height_interpolation=1.875, width_interpolation=1.875)
    whole = mixin(GRID)[0, 7:].unflatten(0, GRID)
    small = TokenGrid(2, 2, 3)
    assert torch.equal(mixin(small)[0, 7:].unflatten(0, small), whole[:2, :2, :3])
    assert mixin(TokenGrid(1, 9, 11)).shape == (1, 7 + 99, 32)


def test_a_stored_table_wins_at_the_configured_size_only() -> None:
    mixin = sine_mixin()
    with torch.no_grad():
        mixin.pos_embedding.fill_(5.0)
    assert (mixin(TokenGrid(2, 4, 5)) == 5).all()
    assert (mixin(TokenGrid(2, 4, 4)).abs() <= 1).all()


@pytest.mark.parametrize("persistent", [True, False])
def test_rotary_tables_of_other_grids(persistent: bool) -> None:
    mixin = rotary_mixin(persistent=persistent)
    assert ("freqs_cos" in mixin.state_dict()) == persistent
    x = torch.zeros(1)
    whole = mixin.rotary(GRID, x).cos.unflatten(0, GRID)
    for grid in (TokenGrid(2, 4, 5), TokenGrid(3, 2, 3)):
        part = mixin.rotary(grid, x).cos.unflatten(0, grid)
        assert torch.equal(part, whole[: grid.t, : grid.h, : grid.w])


def test_the_type_of_rotary_tables() -> None:
    """Stored tables have the model's type, computed ones are float32 (the first and the later releases)."""
    half = torch.zeros(1, dtype=torch.float16)
    stored, computed = rotary_mixin(persistent=True).half(), rotary_mixin(persistent=False).half()
    assert stored.rotary(GRID, half).sin.dtype == torch.float16
    assert stored.rotary(TokenGrid(1, 2, 2), half).sin.dtype == torch.float16
    assert computed.rotary(GRID, half).sin.dtype == torch.float32


def test_learned_table_is_trainable_zero_and_of_one_size() -> None:
    mixin = rotary_mixin(learnable_pos_embed=True)
    assert mixin.pos_embedding.requires_grad and not mixin.pos_embedding.any()
    assert mixin(TokenGrid(2, 4, 5)).shape == (1, 47, 32)
    with pytest.raises(ValueError, match="4 x 4.*4 x 5"):
        mixin(TokenGrid(2, 4, 4))
    assert rotary_mixin()(GRID) is None


def test_more_frames_than_configured() -> None:
    too_long = TokenGrid(4, 4, 5)
    with pytest.raises(ValueError, match="4 latent frames.*more than the 3"):
        sine_mixin()(too_long)
    with pytest.raises(ValueError, match="4 latent frames.*more than the 3"):
        rotary_mixin().rotary(too_long, torch.zeros(1))


def test_computed_state_is_real_on_the_meta_device() -> None:
    with torch.device("meta"):
        mixins = sine_mixin(), rotary_mixin()
    for mixin, real in zip(mixins, (sine_mixin(), rotary_mixin()), strict=True):
        assert all(t.is_meta for t in mixin.state_dict().values())
        for name, table in mixin.computed_state().items():
            assert table.dtype == torch.float32 and torch.equal(table, real.state_dict()[name])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Basic3DPositionEmbeddingMixin(4, 5, 3, hidden_size=36), "36 is no multiple of 16"),
        (lambda: Rotary3DPositionEmbeddingMixin(4, 5, 3, 32, hidden_size_head=20, text_length=7), "20 is no multiple"),
        (lambda: rotary_mixin(rot_v=True), "rot_v"),
    ],
)
def test_sizes_that_cannot_be(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("patch", [2, [1, 2, 2], [2, 2, 3]])
def test_patches_there_and_back(patch: int | list[int]) -> None:
    """An embedding that copies each patch's values, channels slowest, is undone by `unpatchify`."""
    from sgm.modules.transformer.patch_embed import ImagePatchEmbeddingMixin

    size = PatchSize.parse(patch)
    values = 3 * size.volume
    mixin = ImagePatchEmbeddingMixin(in_channels=3, hidden_size=values, patch_size=patch, bias=False)
    with torch.no_grad():
        mixin.proj.weight.copy_(torch.eye(values).view_as(mixin.proj.weight))
    video = torch.randn(2, 4, 3, 6, 12)
    grid = size.grid(4, 6, 12)
    with torch.no_grad():
        tokens = mixin.embed_video(video)
    assert tokens.shape == (2, grid.tokens, values)
    assert torch.equal(unpatchify(tokens, grid, size), video)


def test_patch_sizes() -> None:
    assert PatchSize.parse(2) == (1, 2, 2, True) and PatchSize.parse([1, 2, 2]) == (1, 2, 2, False)
    for wrong in (0, [2, 2], [1, 0, 2], [1.5, 2, 2]):
        with pytest.raises(ValueError, match="patch_size"):
            PatchSize.parse(wrong)
    with pytest.raises(ValueError, match="frames 3.*patch size 2.*2 and 4"):
        PatchSize.parse([2, 2, 2]).grid(3, 6, 10)


def test_interpolation_keeps_a_longer_axis_within_the_trained_range() -> None:
    """Rows of an axis twice as long come at half the distance; shorter axes keep their spacing."""
    extend, interpolate = sine_mixin(), sine_mixin(other_sizes="interpolate")
    height, width = extend.grid[1:]
    grid = TokenGrid(1, height * 2, width)
    start = extend.text_length
    fine = interpolate(grid)[0, start:].unflatten(0, (height * 2, width))
    own = interpolate(TokenGrid(1, height, width))[0, start:].unflatten(0, (height, width))
    assert torch.allclose(fine[::2], own, atol=1e-6)
    far = extend(grid)[0, start:].unflatten(0, (height * 2, width))
    assert torch.equal(far[:height], own) and not torch.allclose(far[::2], own, atol=1e-2)
    small = TokenGrid(1, height - 1, width - 1)
    assert torch.equal(interpolate(small), extend(small))
    assert (interpolate.stretch(grid), interpolate.stretch(small)) == (2.0, pytest.approx((width - 1) / width, rel=0.2))


def test_tables_of_several_grids_are_kept() -> None:
    mixin = sine_mixin()
    grids = [TokenGrid(1, k, k + 2) for k in range(1, 12)]
    kept = [mixin(grid) for grid in grids]
    assert mixin(grids[-1]) is kept[-1] and mixin(grids[-8]) is kept[-8]
    assert mixin(grids[0]) is not kept[0] and torch.equal(mixin(grids[0]), kept[0])
