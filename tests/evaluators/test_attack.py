"""Attacks: where they may go, what they do by hand, and that a kept library does the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.evaluators import attack
from pipeline.evaluators.attack import Pixels

CLASSES, CHANNELS, SIZE = 4, 3, 6
PIXELS = Pixels((0.3, 0.5, 0.6), (0.1, 0.2, 0.4))
EPSILON = 8 / 255


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network() -> nn.Sequential:
    """Smooth, so that no pixel's slope is zero, and in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(CHANNELS, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(6 * SIZE**2, CLASSES),
        ).eval()


def normalised(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (PIXELS.mean, PIXELS.std))
    return (pixels - mean) / std


def pixel_values(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (PIXELS.mean, PIXELS.std))
    return images * std + mean


def batch(num: int = 9) -> tuple[Tensor, Tensor]:
    """Images as they come: whole grey levels, a third of them black or white."""
    rng = np.random.default_rng(3)
    levels = rng.integers(-60, 316, (num, CHANNELS, SIZE, SIZE)).clip(0, 255)
    return normalised(torch.from_numpy(levels / 255).float()), torch.arange(num) % CLASSES


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


Attack = Callable[..., Tensor]

ATTACKS: dict[str, Attack] = {
    "fgsm": attack.fgsm,
    "pgd": attack.pgd,
    "pgd from anywhere": lambda *given, **options: attack.pgd(*given, **options, generator=generator()),
    "one step": lambda *given, **options: attack.one_step(*given, **options, generator=generator()),
}
every_attack = pytest.mark.parametrize("name", ATTACKS)


def attacked(name: str, epsilon: float = EPSILON, net: Any = None, **options: Any) -> Tensor:
    images, labels = batch()
    net = network() if net is None else net
    return ATTACKS[name](net, images, labels, epsilon=epsilon, pixels=PIXELS, **options)


# ---------------------------------------------------------------------------------------------- where they go


@every_attack
@pytest.mark.parametrize("epsilon", [1 / 255, 8 / 255, 0.5])
def test_no_pixel_moves_further_than_epsilon_or_beyond_black_and_white(name: str, epsilon: float) -> None:
    """In every channel alike, whatever its normalisation."""
    clean = pixel_values(batch()[0])
    found = pixel_values(attacked(name, epsilon))
    assert float((found - clean).abs().max()) <= epsilon + 1e-6
    assert -1e-6 <= float(found.min()) and float(found.max()) <= 1 + 1e-6
    inside = (clean >= epsilon) & (clean <= 1 - epsilon)
    for channel in range(CHANNELS):
        moved = (found - clean).abs()[:, channel][inside[:, channel]]
        if len(moved):
            assert float(moved.max()) == pytest.approx(epsilon, rel=1e-4)


@every_attack
def test_the_loss_rises(name: str) -> None:
    images, labels = batch()
    net = network()
    before = F.cross_entropy(net(images), labels)
    assert float(F.cross_entropy(net(attacked(name)), labels).detach()) > float(before.detach())


def test_more_steps_find_more() -> None:
    _, labels = batch()
    net = network()
    losses = {
        name: float(F.cross_entropy(net(attacked(name, 0.2)), labels).detach()) for name in ("fgsm", "pgd")
    }
    assert losses["pgd"] > losses["fgsm"]


# -------------------------------------------------------------------------------------------------- by hand


def slope_of(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """By central differences in double precision."""
    net, images = net.double(), images.double()
    slope = torch.zeros_like(images)
    for index in np.ndindex(*images.shape[1:]):
        shift = torch.zeros_like(images)
        shift[(slice(None), *index)] = 1e-5
        with torch.no_grad():
            sides = [F.cross_entropy(net(images + s * shift), labels, reduction="none") for s in (1, -1)]
        slope[(slice(None), *index)] = (sides[0] - sides[1]) / 2e-5
    return slope


def clipped(pixels: Tensor, clean: Tensor, epsilon: float) -> Tensor:
    return torch.minimum(torch.maximum(pixels, clean - epsilon), clean + epsilon).clamp(0, 1)


def test_fgsm_is_the_sign_of_the_slope() -> None:
    images, labels = batch(4)
    found = attack.fgsm(network(), images, labels, epsilon=EPSILON, pixels=PIXELS)
    clean = pixel_values(images.double())
    expected = clipped(clean + EPSILON * slope_of(network(), images, labels).sign(), clean, EPSILON)
    torch.testing.assert_close(pixel_values(found), expected.float(), rtol=0, atol=1e-6)


def test_the_training_step_starts_at_random_and_takes_its_slope_at_the_clean_image() -> None:
    """δ = clip(δ₀ + 1.25 ε sign g, −ε, ε), then valid pixels."""
    images, labels = batch(4)
    found = attack.one_step(network(), images, labels, epsilon=EPSILON, pixels=PIXELS, generator=generator(5))
    start = EPSILON * (2 * torch.rand(images.shape, generator=generator(5)) - 1)
    clean = pixel_values(images)
    sign = slope_of(network(), images, labels).sign().float()
    expected = clipped(clean + start + 1.25 * EPSILON * sign, clean, EPSILON)
    torch.testing.assert_close(pixel_values(found), expected, rtol=0, atol=1e-6)
    assert not torch.equal(found, attacked("fgsm")[:4])


def test_one_step_of_pgd_as_long_as_epsilon_is_fgsm() -> None:
    found = attacked("pgd", steps=1, step_size=EPSILON)
    torch.testing.assert_close(found, attacked("fgsm"))
    torch.testing.assert_close(attacked("pgd", steps=1), found)


def test_steps_of_pgd_are_2_5_epsilon_together_unless_stated() -> None:
    stated = attacked("pgd", steps=4, step_size=2.5 * EPSILON / 4)
    assert torch.equal(stated, attacked("pgd", steps=4))
    assert not torch.equal(stated, attacked("pgd", steps=4, step_size=EPSILON / 4))


# ------------------------------------------------------------------------------------------- the kept library


def test_they_agree_with_the_adversarial_robustness_toolbox() -> None:
    """On pixels that have a slope both see alike: where it is next to nothing, rounding decides its
    sign."""
    pytest.importorskip("art", reason="the Adversarial Robustness Toolbox is a development dependency")
    from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    images, labels = batch(40)
    pixels = pixel_values(images).clamp(0, 1).numpy()
    mean, std = (np.array(values, dtype=np.float32).reshape(-1, 1, 1) for values in (PIXELS.mean, PIXELS.std))
    theirs = PyTorchClassifier(
        network(),
        nn.CrossEntropyLoss(),
        (CHANNELS, SIZE, SIZE),
        CLASSES,
        clip_values=(0.0, 1.0),
        preprocessing=(mean, std),
        device_type="cpu",
    )
    for epsilon in (2 / 255, 8 / 255):
        single = FastGradientMethod(theirs, norm=np.inf, eps=epsilon, batch_size=40)
        many = ProjectedGradientDescentPyTorch(
            theirs,
            norm=np.inf,
            eps=epsilon,
            eps_step=2.5 * epsilon / 10,
            max_iter=10,
            num_random_init=0,
            batch_size=40,
            verbose=False,
        )
        for other, name in ((single, "fgsm"), (many, "pgd")):
            ours = ATTACKS[name](network(), images, labels, epsilon=epsilon, pixels=PIXELS)
            apart = np.abs(pixel_values(ours).numpy() - other.generate(pixels, labels.numpy()))
            differing = float((apart > 1e-5).mean())
            assert differing < 2e-3, f"{name} at {epsilon}: {differing:.2%} of all pixels"
            assert apart.max() <= 2 * epsilon + 1e-6


# -------------------------------------------------------------------------------------------- what they leave


@every_attack
def test_they_are_functions_of_what_they_are_given(name: str) -> None:
    before = torch.random.get_rng_state()
    assert torch.equal(attacked(name), attacked(name))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_another_generator_gives_another_start() -> None:
    images, labels = batch()
    one, two = (
        attack.one_step(network(), images, labels, epsilon=EPSILON, pixels=PIXELS, generator=generator(seed))
        for seed in (0, 1)
    )
    assert not torch.equal(one, two)


@every_attack
def test_weights_statistics_and_images_stay_and_get_no_gradient(name: str) -> None:
    net = network()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    images, labels = batch()
    kept = images.clone()
    found = ATTACKS[name](net, images, labels, epsilon=EPSILON, pixels=PIXELS)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(images, kept) and not found.requires_grad


@every_attack
def test_they_work_where_gradients_are_off(name: str) -> None:
    expected = attacked(name)
    with torch.no_grad():
        assert torch.equal(attacked(name), expected)


def test_another_number_of_channels_is_no_match() -> None:
    with pytest.raises(AssertionError, match="3 channels, but images of shape"):
        attack.fgsm(network(), torch.zeros(2, 1, 6, 6), torch.zeros(2), epsilon=0.1, pixels=PIXELS)
