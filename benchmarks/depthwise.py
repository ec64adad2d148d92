"""What depthwise convolutions take with the gradients of `pipeline.spaces.depthwise`, beside PyTorch's own.

Forward and backward of one convolution on one CPU thread, the two in turn, --repeats times; the best of each.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from benchmarks.record import Evidence, at_most, markdown_table, parser_for, run_script, start_tuned

SHAPES = ((16, 28), (48, 28), (96, 14), (192, 7))
"""Channels, and pixels per side."""
KINDS = {"5×5": (5, 1, 1), "5×5, stride 2": (5, 2, 1), "3×3, dilated": (3, 1, 2), "5×5, dilated": (5, 1, 2)}
"""Kernel, stride, dilation."""


def main() -> bool:
    parser = parser_for("depthwise", __doc__, "--json depthwise.json")
    parser.add_argument("--images", type=int, default=96, metavar="N", help="of a batch (default: 96)")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="default: 10")
    asked = parser.parse_args()
    start_tuned("depthwise")
    import torch

    from pipeline.spaces.depthwise import Geometry, depthwise

    torch.set_num_threads(1)
    torch.manual_seed(0)
    evidence = Evidence("depthwise")
    rows, ratios = [], {}
    for kind, geometry in KINDS.items():
        for channels, size in SHAPES:
            conv = Geometry(channels, *geometry)
            x = torch.randn(asked.images, channels, size, size).to(memory_format=torch.channels_last)
            weight = torch.randn(channels, 1, conv.kernel, conv.kernel, requires_grad=True)
            slope = torch.randn_like(conv.convolve(x, weight))
            x.requires_grad_()

            def step(convolve: Callable[..., torch.Tensor], *more: Geometry) -> float:
                started = time.perf_counter()
                torch.autograd.grad(convolve(x, weight, *more), [x, weight], slope)  # noqa: B023
                return 1e3 * (time.perf_counter() - started)

            taken = [(step(depthwise, conv), step(conv.convolve)) for _ in range(asked.repeats)]
            ours_ms, theirs_ms = (min(column) for column in zip(*taken, strict=True))
            name = f"{kind}, {channels} channels, {size}²"
            ratios[name] = ours_ms / theirs_ms
            rows.append([name, f"{ours_ms:.2f}", f"{theirs_ms:.2f}", f"{ratios[name]:.2f}"])
    return evidence.finish(
        asked.json,
        seeds=[0],
        numbers={"ratios": ratios},
        targets=[at_most("the largest share of PyTorch's time", max(ratios.values()), 1.0)],
        table=markdown_table(["convolution", "ours ms", "PyTorch's ms", "ratio"], rows),
    )


if __name__ == "__main__":
    run_script(main)
