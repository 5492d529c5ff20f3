"""Position information of video tokens: sine tables added to the sequence, or rotations of q and k.

Tables are computed on the CPU whatever the default device, so a model built on the meta device can ask for them
later. Rows follow the token order (t, h, w); text has no position.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Annotated, Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from sgm.modules.ops.block_ops import RotaryTable
from sgm.modules.transformer.block import NetworkInputs, TokenGrid
from sgm.modules.transformer.sat_base import BaseMixin
from sgm.typed import Positive, Range, Size

T = TypeVar("T")

MAX_PERIOD = 10000.0
LARGEST_STRETCH = 2.0  # tokens along an axis in relation to the configured ones, for training on other sizes
TABLES_KEPT = 8  # grids whose tables stay in memory
OtherSizes = Literal["extend", "interpolate"]
Divisor = Annotated[float, Range(1e-6, 1e6)]
TextLength = Annotated[int, Range(0, 65536)]
Spacing = tuple[float, float, float]  # divisors of the positions along t, h, w


def sincos_axis(count: int, width: int, divisor: float) -> Tensor:
    """Embedding (count, width) of positions 0, 1/divisor, ...: all sines, then all cosines, float64.

    The i-th frequency is 10000^(-i / (width/2)). Positions are rounded to float32 first, as in the original.
    """
    positions = torch.arange(count, dtype=torch.float32, device="cpu") / divisor
    exponents = torch.arange(width // 2, dtype=torch.float64, device="cpu") / (width / 2)
    angles = positions.double()[:, None] * (1.0 / MAX_PERIOD**exponents)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def sincos_table(grid: TokenGrid, width: int, divisors: Spacing, dtype: torch.dtype = torch.float64) -> Tensor:
    """Table (t*h*w, width): a quarter for time, three eighths for the column, three eighths for the row.

    Values are found in float64, and rounded to `dtype` before they are repeated.

    Note the order: time, then WIDTH, then HEIGHT.
    """
    time, row, column = (
        sincos_axis(count, part, divisor).to(dtype)
        for count, part, divisor in zip(grid, (width // 4, width // 8 * 3, width // 8 * 3), divisors, strict=True)
    )
    return _on_grid(grid, (0, time), (2, column), (1, row))


def _on_grid(grid: TokenGrid, *parts: tuple[int, Tensor]) -> Tensor:
    """Rows (t*h*w) of all parts side by side, each of which is (count, width) along one axis of the grid."""
    places = torch.cartesian_prod(*(torch.arange(count, device="cpu") for count in grid))  # (t*h*w, 3)
    return torch.cat([values[places[:, axis]] for axis, values in parts], dim=-1)


def rotary_table(
    grid: TokenGrid, head_width: int, theta: float = MAX_PERIOD, divisors: Spacing = (1.0, 1.0, 1.0)
) -> RotaryTable:
    """Cosines and sines (t*h*w, head_width), float32: a quarter of the channels for t, three eighths for h and for w.

    Axis of m channels: angle p * theta^(-2i/m), the same for the adjacent channels 2i and 2i+1
    (Su et al. 2021, arXiv:2104.09864, 3.4.2, along each axis).
    """
    parts = (head_width // 4, head_width // 8 * 3, head_width // 8 * 3)
    axes = [
        _rotary_axis(count, part, theta, divisor) for count, part, divisor in zip(grid, parts, divisors, strict=True)
    ]
    angles = _on_grid(grid, *enumerate(axes))
    return RotaryTable(angles.cos(), angles.sin())


def _rotary_axis(count: int, width: int, theta: float, divisor: float) -> Tensor:
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
    positions = torch.arange(count, dtype=torch.float32, device="cpu") / divisor
    return (positions[:, None] * (1.0 / theta**exponents)).repeat_interleave(2, dim=-1)


class PositionMixin(BaseMixin):
    """What both kinds of positions share: the configured grid, its limits, and a small memory for other grids.

    Args:
        other_sizes: positions of heights and widths other than the configured ones: "extend" keeps their spacing, so a
            smaller grid gets a part of the trained positions and a larger one goes beyond; "interpolate" places a
            longer axis within the trained range.
    """

    rotates = False
    is_learned = False  # whether a learned table fixes height and width

    def __init__(
        self, height: int, width: int, compressed_num_frames: int, text_length: int, other_sizes: OtherSizes = "extend"
    ):
        super().__init__()
        self.other_sizes = other_sizes
        self.divisors: Spacing = (1.0, 1.0, 1.0)
        self.grid = TokenGrid(compressed_num_frames, height, width)
        self.text_length = text_length
        self._tables: OrderedDict[Hashable, Any] = OrderedDict()

    def rotary(self, grid: TokenGrid, like: Tensor) -> RotaryTable | None:
        """Rotation table for `grid` on the device of `like`; None for models that do not rotate."""
        return None

    def computed_state(self) -> dict[str, Tensor]:
        """Entries of this mixin's state that the configuration determines, computed now in float32 on the CPU."""
        return {}

    def reinit(self, parent_model: nn.Module | None = None) -> None:
        """Fill the tables that the configuration determines."""
        own = dict(self.named_parameters()) | dict(self.named_buffers())
        if any(tensor.is_meta for tensor in own.values()):
            return
        with torch.no_grad():
            for name, table in self.computed_state().items():
                own[name].copy_(table)

    def check_grid(self, grid: TokenGrid) -> None:
        """Whether this model has positions for a grid.

        Raises:
            ValueError: too many frames, or another height or width than a learned table has.
        """
        if grid.t > self.grid.t:
            raise ValueError(
                f"{grid.t} latent frames (in patches) are more than the {self.grid.t} that this model has positions "
                "for; shorten the clip, or raise num_frames of network_config for a model trained on longer ones."
            )
        if self.is_learned and not self._is_configured(grid):
            raise ValueError(
                f"a token grid of {grid.h} x {grid.w} (height x width) does not fit the learned position table of "
                f"{self.grid.h} x {self.grid.w}; use the resolution that latent_height and latent_width configure."
            )

    def stretch(self, grid: TokenGrid) -> float:
        """The larger of height and width in relation to the configured one."""
        return max(grid.h / self.grid.h, grid.w / self.grid.w)

    def spacing(self, grid: TokenGrid) -> Spacing:
        """Divisors of the positions of a grid."""
        time, row, column = self.divisors
        if self.other_sizes == "extend":
            return self.divisors
        return time, row * max(1.0, grid.h / self.grid.h), column * max(1.0, grid.w / self.grid.w)

    def _is_configured(self, grid: TokenGrid) -> bool:
        return grid[1:] == self.grid[1:]

    def _cached(self, key: Hashable, make: Callable[[], T]) -> T:
        if key not in self._tables:
            if len(self._tables) >= TABLES_KEPT:
                self._tables.popitem(last=False)
            # A table first needed while sampling may serve a training step next.
            with torch.inference_mode(False), torch.no_grad():
                self._tables[key] = make()
        self._tables.move_to_end(key)
        return self._tables[key]


class Basic3DPositionEmbeddingMixin(PositionMixin):
    """A fixed sine table added to the sequence (2B).

    At the configured height and width the table of the state dict is used, whatever it holds, cut to the frames at
    hand. Other heights and widths get a table computed for them, see `other_sizes`.

    Args:
        compressed_num_frames: configured (and largest) number of frames, in patches.
        hidden_size: model width d; must be a multiple of 16.
        text_length: number of text tokens in front; their rows are zero.
        height_interpolation, width_interpolation, time_interpolation: divisors of the positions.
    """

    def __init__(
        self,
        height: Size,
        width: Size,
        compressed_num_frames: Size,
        hidden_size: Size,
        text_length: TextLength = 0,
        height_interpolation: Divisor = 1.0,
        width_interpolation: Divisor = 1.0,
        time_interpolation: Divisor = 1.0,
        other_sizes: OtherSizes = "extend",
    ):
        super().__init__(height, width, compressed_num_frames, text_length, other_sizes)
        if hidden_size % 16:
            raise ValueError(f"hidden_size {hidden_size} is no multiple of 16, which three sine axes need.")
        self.hidden_size = hidden_size
        self.divisors = (time_interpolation, height_interpolation, width_interpolation)
        rows = text_length + self.grid.tokens
        self.pos_embedding = nn.Parameter(torch.zeros(1, rows, hidden_size), requires_grad=False)

    def computed_state(self) -> dict[str, Tensor]:
        return {"pos_embedding": self._table(self.grid)}

    def position_embedding_forward(self, position_ids: Any, *, inputs: NetworkInputs, **_: Any) -> Tensor:
        """SAT hook: rows (1, l + t*h*w, d) to be added to the sequence."""
        return self(inputs.grid)

    def forward(self, grid: TokenGrid) -> Tensor:
        self.check_grid(grid)
        if self._is_configured(grid):
            return self.pos_embedding[:, : self.text_length + grid.tokens]
        device, dtype = self.pos_embedding.device, self.pos_embedding.dtype
        return self._cached((grid, device, dtype), lambda: self._table(grid).to(device, dtype))

    def _table(self, grid: TokenGrid) -> Tensor:
        video = sincos_table(grid, self.hidden_size, self.spacing(grid), torch.float32)
        return torch.cat((video.new_zeros(self.text_length, self.hidden_size), video)).unsqueeze(0)


class Rotary3DPositionEmbeddingMixin(PositionMixin):
    """Rotations of q and k of the video tokens (5B), with a learned table added on top where configured.

    Args:
        height, width, compressed_num_frames, text_length: see `Basic3DPositionEmbeddingMixin`.
        hidden_size_head: width of an attention head; must be a multiple of 16.
        rot_v: not available; v is never rotated.
        learnable_pos_embed: add a trainable table (5B image-to-video), which fixes height and width.
        persistent: keep the tables in the state dict as `freqs_sin` and `freqs_cos`, in the model's type (the form of
            the first release); otherwise they are computed in float32 for each grid.
        height_interpolation, width_interpolation, time_interpolation: without effect, as in the original.
    """

    rotates = True
    freqs_sin: Tensor
    freqs_cos: Tensor

    def __init__(
        self,
        height: Size,
        width: Size,
        compressed_num_frames: Size,
        hidden_size: Size,
        hidden_size_head: Size,
        text_length: TextLength,
        theta: Positive = MAX_PERIOD,
        rot_v: bool = False,
        learnable_pos_embed: bool = False,
        persistent: bool = True,
        height_interpolation: Divisor = 1.0,
        width_interpolation: Divisor = 1.0,
        time_interpolation: Divisor = 1.0,
        other_sizes: OtherSizes = "extend",
    ):
        super().__init__(height, width, compressed_num_frames, text_length, other_sizes)
        if hidden_size_head % 16:
            raise ValueError(f"hidden_size_head {hidden_size_head} is no multiple of 16, which three axes need.")
        if rot_v:
            raise ValueError("rot_v: true is not supported; no published model rotates v. Leave it out.")
        self.hidden_size_head = hidden_size_head
        self.theta = theta
        self.persistent = persistent
        self.is_learned = learnable_pos_embed
        rows = text_length + self.grid.tokens
        self.pos_embedding = nn.Parameter(torch.zeros(1, rows, hidden_size)) if learnable_pos_embed else None
        if persistent:
            self.register_buffer("freqs_sin", torch.zeros(self.grid.tokens, hidden_size_head))
            self.register_buffer("freqs_cos", torch.zeros(self.grid.tokens, hidden_size_head))

    def computed_state(self) -> dict[str, Tensor]:
        if not self.persistent:
            return {}
        table = self._table(self.grid)
        return {"freqs_sin": table.sin, "freqs_cos": table.cos}

    def position_embedding_forward(self, position_ids: Any, *, inputs: NetworkInputs, **_: Any) -> Tensor | None:
        """SAT hook: the learned table's rows (1, l + t*h*w, d), or None."""
        return self(inputs.grid)

    def forward(self, grid: TokenGrid) -> Tensor | None:
        if self.pos_embedding is None:
            return None
        self.check_grid(grid)
        return self.pos_embedding[:, : self.text_length + grid.tokens]

    def rotary(self, grid: TokenGrid, like: Tensor) -> RotaryTable:
        self.check_grid(grid)
        if self.persistent and self._is_configured(grid):
            return RotaryTable(self.freqs_cos[: grid.tokens], self.freqs_sin[: grid.tokens])
        dtype = like.dtype if self.persistent else torch.float32
        key = (grid, like.device, dtype)
        return self._cached(key, lambda: RotaryTable(*(part.to(like.device, dtype) for part in self._table(grid))))

    def _table(self, grid: TokenGrid) -> RotaryTable:
        return rotary_table(grid, self.hidden_size_head, self.theta, self.spacing(grid))
