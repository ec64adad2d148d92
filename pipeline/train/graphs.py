"""A training step as one CUDA graph: recorded once, then started as a whole.

A step of a small network is some three hundred kernels of a few microseconds each, and starting them one by
one takes the host several times as long as the GPU takes to compute them. What is recorded must do the same
work every time, on tensors that stay where they are, without a word from the host: the rate is a tensor on
the device, batches are copied to one place, and random numbers are drawn from torch's generator, whose seed
is read anew at every start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor], Tensor]
"""(images, labels) → the loss, weights updated."""

WARM_UP = 3
"""Steps before the recording, in which libraries choose their algorithms and optimisers make their
buffers."""


class Graphed:
    """Does what `step` does, for batches of one shape on one GPU."""

    def __init__(self, step: Step, device: torch.device) -> None:
        self._step = step
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._warm = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._images = self._labels = self._loss = torch.empty(0)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        if self._graph is None and self._warm < WARM_UP:
            self._warm += 1
            return self._aside(images, labels)
        if self._graph is None:
            self._record(images, labels)
        assert self._graph is not None
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._graph.replay()
        return self._loss.clone()

    def _aside(self, images: Tensor, labels: Tensor) -> Tensor:
        """A plain step on the stream that will be recorded: autograd comes back to where it was first."""
        present = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(present)
        with torch.cuda.stream(self._stream):
            loss = self._step(images, labels)
        present.wait_stream(self._stream)
        return loss

    def _record(self, images: Tensor, labels: Tensor) -> None:
        """Nothing is computed yet. Other threads of this process may go on with the GPU meanwhile."""
        self._images, self._labels = images.clone(), labels.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._loss = self._step(self._images, self._labels)
        self._graph = graph


@contextmanager
def tuned_convolutions(device: torch.device) -> Iterator[None]:
    """cuDNN tries its algorithms on every shape it meets: worth it where shapes repeat, as in the training
    of one network, and a loss where they change with every step, as in a supernet's."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = device.type == "cuda" or before
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
