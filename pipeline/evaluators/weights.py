"""Weights and their momentum as arrays: what a supernet's training goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.types import Arrays


def arrays_of(weights: Mapping[str, Tensor], optimiser: torch.optim.Optimizer) -> Arrays:
    """By name `weight/NAME`, and `momentum/NAME` where a step has left some. Copies."""
    arrays: Arrays = {}
    for name, weight in weights.items():
        arrays[f"weight/{name}"] = _to_numpy(weight)
        momentum = optimiser.state[weight].get("momentum_buffer")
        if momentum is not None:
            arrays[f"momentum/{name}"] = _to_numpy(momentum)
    return arrays


def _to_numpy(value: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return value.detach().contiguous().cpu().numpy().copy()


@torch.no_grad()
def take_arrays(arrays: Arrays, weights: Mapping[str, Tensor], optimiser: torch.optim.Optimizer) -> None:
    """The inverse of `arrays_of`, in place: in every weight's own place in memory."""
    for name, weight in weights.items():
        weight.copy_(torch.from_numpy(arrays[f"weight/{name}"]))
        momentum = arrays.get(f"momentum/{name}")
        optimiser.state[weight].clear()
        if momentum is not None:
            kept = torch.empty_like(weight).copy_(torch.from_numpy(momentum))
            optimiser.state[weight]["momentum_buffer"] = kept
