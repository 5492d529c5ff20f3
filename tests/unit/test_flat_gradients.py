"""One buffer for all gradients: what it does to them, without DeepSpeed. With it: integration/test_training_zero.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sgm.training.optimizers.flat_gradients import FlatGradients


def buffer_of(clip: float, scale: float) -> FlatGradients:
    """Over one group of two parameters, in DeepSpeed's form."""
    flat = torch.zeros(6)
    group = [nn.Parameter(flat[:4].view(2, 2)), nn.Parameter(flat[4:])]
    wrapper = SimpleNamespace(
        dp_process_group=None, bit16_groups_flat=[flat], bit16_groups=[group], clip_grad=clip, loss_scale=scale
    )
    return FlatGradients(wrapper)


@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("clip, factor", [(0.0, 1.0), (10.0, 1.0), (5.0, 1.0), (2.5, 0.5)])
def test_a_gradient_is_unscaled_and_shortened_but_never_lengthened(clip, factor, scale):
    gradient = torch.tensor([3.0, 0.0, 4.0])  # of length 5
    partitions = [gradient[:1] * scale, gradient[1:] * scale]
    buffer_of(clip, scale).unscale_and_clip(partitions, torch.tensor(5.0 * scale))
    torch.testing.assert_close(torch.cat(partitions), gradient * factor, rtol=1e-6, atol=0)
