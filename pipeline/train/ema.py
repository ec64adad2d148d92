"""Averaged weights, and batch norm statistics for weights that were not trained as they stand.

The average is exponential over steps, with a memory that grows at the start, so that a short run is not
held back by its first weights. Batch norm's running statistics are averaged in the same way: no pass over
data is needed before an evaluation, and at the end of a cosine decay the weights they belong to hardly move.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

if TYPE_CHECKING:
    from pipeline.data.base import BatchStream


def effective_decay(decay: float, updates: int) -> float:
    """The decay of the update that follows `updates` earlier ones: min(decay, (1 + n)/(10 + n))."""
    return min(decay, (1 + updates) / (10 + updates))


class Ema:
    """`module` is a copy of the network whose weights and statistics are an exponential average of its own.

    It keeps references to the network's tensors: the network must be on its device when this is made."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(network).eval().requires_grad_(False)
        self._averages, self._counters = _floats_and_counters(self.module)
        self._present, self._present_counters = _floats_and_counters(network)

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the network's present weights; `updates` is how often this was called before."""
        torch._foreach_lerp_(self._averages, self._present, 1 - effective_decay(self.decay, updates))
        if self._counters:
            torch._foreach_copy_(self._counters, self._present_counters)


def _floats_and_counters(network: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    tensors = [*network.parameters(), *network.buffers()]
    return [t for t in tensors if t.is_floating_point()], [t for t in tensors if not t.is_floating_point()]


@torch.no_grad()
def recalibrate(network: nn.Module, stream: BatchStream, batches: int) -> None:
    """Replace batch norm's running statistics by the plain average over the stream's first `batches` batches.

    For weights that come out of a supernet, whose statistics belong to no single network. All else stays:
    weights, modes, momentum."""
    assert batches >= 1, "an average needs at least one batch"
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    device = next(network.parameters()).device
    modes = {module: module.training for module in network.modules()}
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's cumulative average
        norm.train()
    try:
        for step in range(batches):
            network(stream.at(step)[0].to(device))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
