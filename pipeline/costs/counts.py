"""Parameters, multiply-adds and weight bytes: read off a space's layers, or counted in a built module.

"FLOPs" follow fvcore: one multiply-add of a convolution or linear layer is one FLOP; bias, batch norm,
activations, pooling and additions are left out. Parameters are those that are trained: batch norm's scale and
shift count, its running statistics do not.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pipeline.types import Layer

if TYPE_CHECKING:
    from torch import nn

FLOAT_BYTES = 4


def params(layers: Iterable[Layer]) -> int:
    """Trained parameters."""
    return sum(layer.parameters for layer in layers)


def flops(layers: Iterable[Layer]) -> int:
    """Multiply-adds of convolutions and linear layers for one image."""
    return sum(layer.macs for layer in layers)


def weight_bytes(layers: Iterable[Layer]) -> int:
    """Bytes of float32 weights in the deployed file: of a folded batch norm only a bias is left."""
    return FLOAT_BYTES * sum(deployed_weights(layer) for layer in layers)


def deployed_weights(layer: Layer) -> int:
    """Numbers that the deployed layer holds: scale and shift of a folded batch norm become one bias.

    A batch norm of its own keeps its mean and variance beside them, or nothing where it is folded too."""
    if layer.kind == "norm":
        return 0 if layer.normalised else 2 * layer.parameters
    return layer.parameters - layer.channels_out if layer.normalised else layer.parameters


def summarise(layers: Sequence[Layer]) -> tuple[int, int, int]:
    """(params, flops, weight_bytes)."""
    return params(layers), flops(layers), weight_bytes(layers)


def module_params(network: nn.Module) -> int:
    """Trained parameters of a built module; a shared one counts once."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def module_flops(network: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Multiply-adds of a built module's convolutions and linear layers for one image, counted by fvcore.

    Other operators (batch norm, pooling) are traced but left out of the sum; `network` is left as it was.
    """
    import torch

    with warnings.catch_warnings():  # fvcore compiles an unrelated loss with torch.jit when it is imported
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is (deprecated|not supported)")
        from fvcore.nn import FlopCountAnalysis

    training = network.training
    parameter = next(network.parameters())
    analysis = FlopCountAnalysis(network.eval(), torch.zeros(1, *image_shape, device=parameter.device))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    try:
        by_operator = analysis.by_operator()
    finally:
        network.train(training)
    return int(sum(by_operator[name] for name in ("conv", "linear", "addmm", "matmul", "bmm")))
