"""Adam with explicit state, in numpy.

D. P. Kingma and J. Ba, "Adam: A Method for Stochastic Optimization", 2014, arXiv 1412.6980, algorithm 1;
weight decay is added to the gradient, as torch.optim.Adam does.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pipeline.types import FloatArray


class Moments(NamedTuple):
    """Running means of the gradient and of its square, both of the parameters' shape, and the steps
    taken."""

    first: FloatArray
    second: FloatArray
    steps: int


class AdamSettings(NamedTuple):
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    epsilon: float = 1e-8


def start(parameters: FloatArray) -> Moments:
    return Moments(np.zeros_like(parameters), np.zeros_like(parameters), 0)


def step(
    parameters: FloatArray, gradient: FloatArray, moments: Moments, settings: AdamSettings
) -> tuple[FloatArray, Moments]:
    """The parameters after a step down the gradient, and the moments after it."""
    rate, beta1, beta2, weight_decay, epsilon = settings
    gradient = gradient + weight_decay * parameters
    steps = moments.steps + 1
    first = beta1 * moments.first + (1 - beta1) * gradient
    second = beta2 * moments.second + (1 - beta2) * gradient**2
    scale = np.sqrt(second / (1 - beta2**steps)) + epsilon
    return parameters - rate * first / (1 - beta1**steps) / scale, Moments(first, second, steps)
