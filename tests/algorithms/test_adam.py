import numpy as np
import torch

from pipeline.algorithms import adam
from pipeline.algorithms.adam import AdamSettings


def test_its_steps_are_torch_s() -> None:
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(3, 4)), rng.normal(size=(6, 3, 4))
    settings = AdamSettings(0.01, 0.5, 0.999, weight_decay=0.1)
    theirs = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimiser = torch.optim.Adam([theirs], lr=0.01, betas=(0.5, 0.999), weight_decay=0.1)
    ours, moments = start, adam.start(start)
    for gradient in gradients:
        ours, moments = adam.step(ours, gradient, moments, settings)
        theirs.grad = torch.from_numpy(gradient)
        optimiser.step()
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-12)
    assert moments.steps == 6


def test_the_first_step_is_of_the_rate_whatever_the_gradient() -> None:
    point = np.zeros(3)
    moved, _ = adam.step(point, np.array([1e-3, -5.0, 70.0]), adam.start(point), AdamSettings(0.1))
    np.testing.assert_allclose(moved, [-0.1, 0.1, -0.1], rtol=1e-4)
    assert not point.any(), "what came in is left alone"
