"""Average pooling whose windows reach beyond the map, as cells have it; only what is inside is averaged."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def average_pool(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """(N, C, H, W) → (N, C, H′, W′).

    On a GPU the map is laid out channel by channel first: where it is channels-last, PyTorch's gradient by it
    is wrong as soon as windows are padded (pytorch issue 188344; so in 2.11 and 2.12)."""
    laid_out = x.contiguous() if x.is_cuda else x
    return F.avg_pool2d(laid_out, kernel, stride, padding, count_include_pad=False)
