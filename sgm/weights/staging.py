"""Between host memory and a GPU: from a mapped file at the speed of the bus, and back while the GPU goes on."""

from __future__ import annotations

import torch
from torch import Tensor

PIECE, PIECES = 32 << 20, 4  # bytes of a pinned buffer, and their number


class StagedCopy:
    """Copies through a ring of pinned buffers: while one piece is on the bus the next is read, by all CPU threads.

    The driver's own way from memory that is not pinned reads with one thread and does not overlap.

    Args:
        device: the target; where it is no GPU the buffers are not pinned and every copy is done at once.
        piece: bytes of a buffer.
    """

    def __init__(self, device: torch.device, piece: int = PIECE):
        self.device, self.piece = device, piece
        self._on_gpu = device.type == "cuda"
        self._ring: list[Tensor] = []
        self._sent: list[torch.cuda.Event | None] = [None] * PIECES
        self._next = 0

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy host tensor `source` into `target`, of the same shape and type, in order with the current stream."""
        if source.nbytes < self.piece // 8 or not (source.is_contiguous() and target.is_contiguous()):
            target.copy_(source)
            return
        to, of = (t.detach().reshape(-1).view(torch.uint8) for t in (target, source))
        for piece, part in zip(to.split(self.piece), of.split(self.piece)):
            self._send(piece, part)

    def _send(self, target: Tensor, source: Tensor) -> None:
        if not self._ring:
            self._ring = [torch.empty(self.piece, dtype=torch.uint8, pin_memory=self._on_gpu) for _ in range(PIECES)]
        slot, self._next = self._next, (self._next + 1) % PIECES
        if (sent := self._sent[slot]) is not None:
            sent.synchronize()  # its last piece has left
        buffer = self._ring[slot][: source.numel()]
        buffer.copy_(source)
        target.copy_(buffer, non_blocking=True)
        if self._on_gpu:
            self._sent[slot] = torch.cuda.current_stream(self.device).record_event()


class Download:
    """A tensor on its way to the CPU. Who reads it waits for it, not for what was queued after it."""

    def __init__(self, tensor: Tensor):
        self._tensor = tensor.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if tensor.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> Tensor:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensor
