"""ZeRO 1 with all gradients in one buffer: one copy, one all-reduce and one norm a step in place of one a tensor.

DeepSpeed's stage 1 runs Python at each gradient, copies it into a bucket, out of the bucket and into a partition, and
takes its norm apart. For a large model that hides behind the arithmetic; a small one waits for it. Where one bucket
holds every gradient (`reduce_bucket_size`), the buffer here takes the bucket's place. Sums, means, clipping and masters
are DeepSpeed's; the norm differs by rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Of DeepSpeed's wrapper, where nothing beside the plain ZeRO 1 is asked for.
PLAIN_SETTINGS = {
    "partition_gradients": False, "cpu_offload": False, "overlap_comm": False, "zenflow": False,
    "has_moe_layers": False, "use_grad_accum_attribute": False, "gradient_average": True, "postscale_gradients": True,
    "compute_grad_norm": True, "gradient_predivide_factor": 1, "sequence_parallel_size": 1,
}  # fmt: skip


class _Partition(list[Tensor]):
    """What DeepSpeed takes for a group's averaged gradients: empty, with the part of this rank in `flat_partition`."""

    def __init__(self, flat_partition: Tensor):
        super().__init__()
        self.flat_partition = flat_partition


class FlatGradients:
    """Takes over from a ZeRO-1 wrapper of DeepSpeed what it does between the backward pass and the optimizer.

    `wrapper`: one for which `fits_one_buffer` holds.
    """

    def __init__(self, wrapper: Any):
        self._wrapper = wrapper
        self._group = wrapper.dp_process_group
        self._buffer = torch.zeros_like(torch.cat(wrapper.bit16_groups_flat))  # padding stays zero
        self._parts = self._buffer.split([flat.numel() for flat in wrapper.bit16_groups_flat])
        self._parameters: list[nn.Parameter] = []
        self._places: list[Tensor] = []  # of each parameter's gradient
        for flat, part, group in zip(wrapper.bit16_groups_flat, self._parts, wrapper.bit16_groups):
            for p in group:
                start = p.storage_offset() - flat.storage_offset()
                self._parameters.append(p)
                self._places.append(part[start : start + p.numel()].view_as(p))
        self._mine: list[Tensor] = []  # this rank's float32 partitions of the step

    def take_over(self) -> None:
        """From here on the wrapper's steps come this way."""
        wrapper = self._wrapper
        for hook in wrapper._grad_acc_hooks:
            hook.remove()
        wrapper._grad_acc_hooks.clear()
        wrapper.reduce_gradients = self.reduce
        wrapper.scaled_global_norm = self.norm
        wrapper.unscale_and_clip_grads = self.unscale_and_clip
        # Would make the weights views of the flat tensor, which they are.
        wrapper._update_model_bit16_weights = lambda group_index: None

    @torch.no_grad()
    def reduce(self, pipeline_parallel: bool = False) -> None:
        """Mean of all gradients over ranks; the parameters give theirs up. Called at the end of accumulation."""
        self._collect()
        ranks = dist.get_world_size(self._group)
        if ranks > 1:
            self._buffer.div_(ranks)
            dist.all_reduce(self._buffer, group=self._group)
        sizes, rank = self._wrapper.partition_size, dist.get_rank(self._group)
        own = [part[rank * size : (rank + 1) * size] for part, size in zip(self._parts, sizes)]
        self._mine = list(torch.cat(own).float().split([part.numel() for part in own]))
        for i, part in enumerate(self._mine):
            self._wrapper.averaged_gradients[i] = _Partition(part)

    def _collect(self) -> None:
        here = [(p.grad, place) for p, place in zip(self._parameters, self._places) if p.grad is not None]
        absent = [place for p, place in zip(self._parameters, self._places) if p.grad is None]
        if absent:
            torch._foreach_zero_(absent)
        if here:
            grads, places = zip(*here)
            torch._foreach_copy_(places, grads)
        for p in self._parameters:
            p.grad = None

    @torch.no_grad()
    def norm(self, norm_type: int = 2) -> Tensor:
        """L2 norm of the mean gradient over all partitions, times the loss scale; inf where it is not finite."""
        squares = torch.stack(torch._foreach_norm(self._mine)).square().sum()
        dist.all_reduce(squares, group=self._group)
        return torch.where(squares.isfinite(), squares.sqrt(), torch.inf)

    def unscale_and_clip(self, partitions: list[Tensor], norm: Tensor) -> None:
        """As DeepSpeed's, without asking the device again whether the norm, which `step` has tested, is finite."""
        scale: float | Tensor = self._wrapper.loss_scale
        if self._wrapper.clip_grad > 0:
            scale = ((norm / scale + 1e-6) / self._wrapper.clip_grad).clamp(min=1.0) * scale
        elif scale == 1:
            return
        torch._foreach_mul_(partitions, 1.0 / scale)


def fits_one_buffer(wrapper: Any) -> bool:
    """Whether DeepSpeed's wrapper for ZeRO 1 and 2 is for 1, of plain settings, on gradients that fill one bucket."""
    plain = all(getattr(wrapper, name) == value for name, value in PLAIN_SETTINGS.items())
    if not plain or not wrapper.bit16_groups:
        return False
    one_group = all(group is wrapper.dp_process_group for group in wrapper.real_dp_process_group)
    types = {flat.dtype for flat in wrapper.bit16_groups_flat} | {wrapper.communication_data_type}
    values = sum(flat.numel() for flat in wrapper.bit16_groups_flat)
    return one_group and len(types) == 1 and values <= wrapper.reduce_bucket_size
