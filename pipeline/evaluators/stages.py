"""The feature maps of a network at each of its resolutions, whatever space built it.

While the network computes, a hook on every module inside it notes the outputs that are feature maps (N,
C, H, W); of each resolution the last one stays: what the network knew before it went on to the next. The
deepest three resolutions are its early, middle and last stage. Maps of a single pixel (a pooled map that
has kept its axes) are no stage unless there is nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from pipeline.errors import ConfigError


class Stages:
    """Runs a network and picks its stages; use `watching`."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._last: dict[tuple[int, int], Tensor] = {}

    def __call__(self, images: Tensor, count: int) -> list[Tensor]:
        """The last feature map of the deepest `count` resolutions, the deepest first; fewer where the
        network has fewer. Raises ConfigError where it has no feature map at all."""
        self._last.clear()
        self._network(images)
        maps = list(reversed(self._last.values()))
        self._last.clear()
        maps = [x for x in maps if x.shape[-2] * x.shape[-1] > 1] or maps
        if not maps:
            raise ConfigError(
                f"evaluator eproxy: {type(self._network).__name__} has no module inside that puts out a "
                "feature map (N, C, H, W); its space cannot be scored by feature maps"
            )
        return maps[:count]

    def note(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 4:
            size = (int(output.shape[-2]), int(output.shape[-1]))
            self._last.pop(size, None)  # so that the order is that of the last output
            self._last[size] = output


@contextmanager
def watching(network: nn.Module) -> Iterator[Stages]:
    stages = Stages(network)
    inside = (module for module in network.modules() if module is not network)
    handles = [module.register_forward_hook(stages.note) for module in inside]
    try:
        yield stages
    finally:
        for handle in handles:
            handle.remove()
