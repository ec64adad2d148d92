"""How gradients lie in memory.

A CPU's gradient of batch norm takes 12 to 20 times as long where what comes in does not lie as the map does
(PyTorch 2.12), such as what the gradient of a concatenation or of a mean over pixels is.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gradient_like_value(x: Tensor) -> Tensor:
    """The same map, (N, C, H, W); its gradient will lie in memory as it does. What an exporter or a compiler
    looks at stays as it is."""
    if x.requires_grad and not torch.compiler.is_compiling():
        last = x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        x.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: gradient.contiguous(memory_format=layout)
        )
    return x


def is_traced() -> bool:
    """Whether an exporter or a compiler is looking, which know operators as they are."""
    return torch._C._get_tracing_state() is not None or torch.compiler.is_compiling()
