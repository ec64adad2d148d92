"""The relaxed supernet as a learning signal: what trains it, the two orders of its upper gradient, and
that it goes on as if never stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from toy_images import CLASSES, WatchedImages, make_task

from pipeline.data.base import ImageTask
from pipeline.errors import ConfigError, DivergedTraining
from pipeline.evaluators import EVALUATORS
from pipeline.evaluators.relaxed import RelaxedSettings, RelaxedSupernet, unrolled_gradient
from pipeline.settings import parse_settings
from pipeline.spaces.mbconv import MBConvSettings, MBConvSpace
from pipeline.spaces.nb201 import CONV1, CONV3, NONE, OPERATIONS, POOL, SKIP, NB201Settings, NB201Space
from pipeline.types import Arch, FloatArray, IntArray

SPACE = NB201Space((3, 8, 8), CLASSES, NB201Settings(cells=1, channels=4, mixed_norm="nodes"))
ARCHS = [SPACE.smallest, Arch("nb201", (CONV1, SKIP, POOL, CONV3, NONE, CONV1)), SPACE.largest]
SETTINGS = RelaxedSettings(batch_size=16, learning_rate=0.1, evaluation_images=20, thorough_images=64)


def make(
    task: ImageTask | None = None, seed: int = 0, total_steps: int = 40, perturb: Any = None, **changed: Any
) -> RelaxedSupernet:
    settings = SETTINGS.model_copy(update=changed)
    return RelaxedSupernet(
        SPACE, task or make_task(), settings, total_steps=total_steps, seed=seed, perturb=perturb
    )


def reads_of(task: ImageTask) -> list[IntArray]:
    assert isinstance(task.source, WatchedImages)
    return task.source.reads


def mixture(seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).uniform(0.1, 0.9, (len(SPACE.edges), len(OPERATIONS)))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------ lower level


def test_training_lowers_losses_on_images_it_never_saw() -> None:
    task = make_task()
    evaluator = make(task)
    before = evaluator.losses_and_grads(mixture(), step=0)[0]
    reads_of(task).clear()
    fits = [evaluator.fit(mixture(), step=step).loss for step in range(40)]
    assert len(reads_of(task)) == 40
    assert set(np.concatenate(reads_of(task))) <= set(task.splits["weights"])
    np.testing.assert_allclose(before, np.log(CLASSES), rtol=0.1)  # untrained: every class alike
    assert evaluator.losses_and_grads(mixture(), step=0)[0] < 0.5 * before
    assert np.mean(fits[-5:]) < 0.6 * fits[0]


def test_a_step_is_plain_descent_on_the_mixture_s_loss_and_reports_its_gradient() -> None:
    """By hand: no momentum, clipping out of reach, weight decay on everything."""
    plain = {"momentum": 0.0, "weight_decay": 0.01, "clip_norm": 1e9}
    evaluator = make(**plain)
    images, labels = evaluator._training.at(0)
    weights = list(evaluator.module.parameters())
    logits = evaluator.supernet.forward(images, torch.from_numpy(mixture().astype(np.float32)))
    slopes = torch.autograd.grad(F.cross_entropy(logits, labels), weights)
    expected = [w - 0.1 * (g + 0.01 * w) for w, g in zip(weights, slopes, strict=True)]
    info = evaluator.fit(mixture(), step=0)
    for weight, wanted in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight, wanted, rtol=1e-4, atol=1e-6)
    assert info.grad_sq_norm == pytest.approx(sum(float((g**2).sum()) for g in slopes), rel=1e-4)


def test_the_squared_norm_is_from_before_clipping() -> None:
    free, clipped = make(clip_norm=1e9), make(clip_norm=1e-3)
    assert free.fit(mixture(), step=0) == clipped.fit(mixture(), step=0)
    assert free.fit(mixture(), step=1) != clipped.fit(mixture(), step=1)


def test_the_rate_falls_from_the_first_to_the_least() -> None:
    evaluator = make(total_steps=100, learning_rate=0.2, least_learning_rate=0.02)
    assert evaluator._rate(0) == pytest.approx(0.2)
    assert evaluator._rate(50) == pytest.approx(0.11)
    assert evaluator._rate(100) == evaluator._rate(400) == pytest.approx(0.02)


def test_architectures_are_trained_on_their_mean_loss() -> None:
    by_hand = make()
    images, labels = by_hand._training.at(0)
    with torch.no_grad():
        losses = [
            F.cross_entropy(by_hand.supernet.forward(images, by_hand._tensor(SPACE.mix_of(a))), labels)
            for a in ARCHS
        ]
    found = make().fit(ARCHS, step=0).loss
    assert found == pytest.approx(float(sum(losses)) / 3, rel=1e-5)


def test_only_what_the_mixture_holds_is_trained() -> None:
    evaluator = make()
    before = evaluator.state()
    evaluator.fit(SPACE.mix_of(ARCHS[1]), step=0)
    after = evaluator.state()
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    convs = {name.split(".convs.")[1].split(".")[0] for name in moved if ".convs." in name}
    assert convs == {"0-1_nor_conv_1x1", "0-3_nor_conv_3x3", "2-3_nor_conv_1x1"}
    assert "weight/skeleton.classifier.weight" in moved


def test_weights_train_on_what_perturb_makes_of_the_images() -> None:
    seen: list[tuple[int, torch.Size]] = []

    def negate(network: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, *, step: int) -> Tensor:
        shown = images.clone().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(network(shown), labels), [shown])
        assert bool(slope.any())
        seen.append((step, images.shape))
        return -images

    evaluator = make(perturb=negate)
    images, labels = evaluator._training.at(3)
    with torch.no_grad():
        logits = evaluator.supernet.forward(-images, evaluator._tensor(mixture()))
        wanted = float(F.cross_entropy(logits, labels))
    clean = evaluator.losses_and_grads(mixture(), step=3)[0]
    assert not seen, "the upper level sees the images as they are"
    np.testing.assert_array_equal(clean, make().losses_and_grads(mixture(), step=3)[0])
    assert evaluator.fit(mixture(), step=3).loss == pytest.approx(wanted, rel=1e-6)
    assert seen == [(3, images.shape)]


def test_diverging_says_where_and_leaves_the_weights_finite() -> None:
    evaluator = make(learning_rate=1e30, least_learning_rate=0.0)
    with pytest.raises(
        DivergedTraining, match=r"at step \d+ \(learning rate .*lower evaluator\.learning_rate"
    ):
        for step in range(9):
            evaluator.fit(mixture(), step=step)
    assert all(np.isfinite(array).all() for array in evaluator.state().values())


# ------------------------------------------------------------------------------------------------ upper level


def test_the_first_order_gradient_is_that_of_the_held_out_loss() -> None:
    task = make_task()
    evaluator = make(task)
    losses, gradients = evaluator.losses_and_grads(mixture(), step=2)
    assert losses.shape == (1,) and gradients.shape == (1, *mixture().shape)
    assert set(np.concatenate(reads_of(task))) <= set(task.splits["architecture"])
    images, labels = evaluator._upper.at(2)
    weights = evaluator._tensor(mixture()).requires_grad_()
    loss = F.cross_entropy(evaluator.supernet.forward(images, weights), labels)
    (wanted,) = torch.autograd.grad(loss, [weights])
    np.testing.assert_allclose(losses, [float(loss.detach())], rtol=1e-6)
    np.testing.assert_allclose(gradients[0], wanted.numpy(), rtol=1e-5, atol=1e-8)
    assert not gradients[0, :, NONE].any() and gradients[0, :, 1:].all()


def test_operations_without_weight_get_no_gradient() -> None:
    mix_EO = mixture() * (np.random.default_rng(1).random(mixture().shape) < 0.5)
    for order in ("first", "second"):
        _, gradients = make(order=order).losses_and_grads(mix_EO, step=0)
        assert gradients.any() and not gradients[0][mix_EO == 0].any()


def test_asking_for_gradients_leaves_no_trace() -> None:
    for order in ("first", "second"):
        evaluator = make(order=order)
        evaluator.fit(mixture(), step=0)
        before = evaluator.state()
        evaluator.losses_and_grads(mixture(), step=1)
        evaluator.losses(ARCHS, step=0, thorough=True)
        after = evaluator.state()
        assert all(np.array_equal(before[name], after[name]) for name in before)
        assert evaluator.fit(mixture(), step=1) == refitted(before).fit(mixture(), step=1)


def refitted(state: dict[str, Any]) -> RelaxedSupernet:
    evaluator = make()
    evaluator.load_state(state)
    return evaluator


def test_second_order_looks_at_the_weights_one_step_on() -> None:
    """Its loss is that after a step of `fit`, taken without clipping on the same images."""
    ahead, stepped = make(order="second", clip_norm=1e9), make(clip_norm=1e9)
    for evaluator in (ahead, stepped):
        evaluator.fit(mixture(), step=0)
    found, gradients = ahead.losses_and_grads(mixture(), step=1)
    here, first_order = stepped.losses_and_grads(mixture(), step=1)
    stepped.fit(mixture(), step=1)
    after, _ = stepped.losses_and_grads(mixture(), step=1)
    np.testing.assert_allclose(found, after, rtol=1e-5)
    assert found != here
    assert np.abs(gradients - first_order).max() > 1e-4


def test_the_second_order_gradient_is_the_derivative_through_the_step() -> None:
    """On the network itself, in double precision: the reference differentiates through the step at once,
    w − ξ (∇L_low + decay · w) as a function of the mixture."""
    evaluator = make()
    for step in range(3):
        evaluator.fit(mixture(), step=step)
    module = evaluator.module.double()
    (train, train_labels), (held, held_labels) = evaluator._training.at(5), evaluator._upper.at(5)
    mix = torch.from_numpy(mixture()).requires_grad_()
    named = dict(module.named_parameters())

    def loss_of(weights: dict[str, Tensor], images: Tensor, labels: Tensor, mix: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(module, weights, (images.double(), mix)), labels)

    lower = loss_of(named, train, train_labels, mix)
    slopes = torch.autograd.grad(lower, list(named.values()), create_graph=True)
    ahead = {name: w - 0.1 * (g + 3e-4 * w) for (name, w), g in zip(named.items(), slopes, strict=True)}
    wanted_loss = loss_of(ahead, held, held_labels, mix)
    (wanted,) = torch.autograd.grad(wanted_loss, [mix])
    loss, gradient = unrolled_gradient(
        list(named.values()),
        mix,
        lambda mix: loss_of(named, train, train_labels, mix),
        lambda mix: loss_of(named, held, held_labels, mix),
        velocity=[None] * len(named),
        rate=0.1,
        momentum=0.9,
        weight_decay=3e-4,
    )
    torch.testing.assert_close(loss, wanted_loss)
    torch.testing.assert_close(gradient, wanted, rtol=1e-7, atol=1e-10)
    (first_order,) = torch.autograd.grad(loss_of(named, held, held_labels, mix), [mix])
    assert not torch.allclose(gradient, first_order, rtol=0.1)


# -------------------------------------------------------------------------------- the unrolled gradient alone


def test_the_unrolled_gradient_of_a_quadratic_bilevel_problem() -> None:
    """min_a (w′ − 1)² + 0.1 a² with w′ = w − ξ (m u + 2 (w − a w₀) + d w), all scalars: by hand,
    dL/da = 2 (w′ − 1) · 2 ξ w₀ + 0.2 a."""
    w, a, velocity = (torch.tensor(x, dtype=torch.float64) for x in (0.7, 0.3, 0.25))
    w.requires_grad_()
    a.requires_grad_()
    rate, momentum, decay, w0 = 0.05, 0.9, 0.01, 1.5
    loss, gradient = unrolled_gradient(
        [w],
        a,
        lambda a: (w - a * w0) ** 2,
        lambda a: (w - 1) ** 2 + 0.1 * a**2,
        velocity=[velocity],
        rate=rate,
        momentum=momentum,
        weight_decay=decay,
    )
    ahead = 0.7 - rate * (momentum * 0.25 + 2 * (0.7 - 0.3 * w0) + decay * 0.7)
    assert float(loss.detach()) == pytest.approx((ahead - 1) ** 2 + 0.1 * 0.3**2, rel=1e-12)
    assert float(gradient) == pytest.approx(2 * (ahead - 1) * 2 * rate * w0 + 0.2 * 0.3, rel=1e-9)
    assert float(w.detach()) == 0.7, "the weight is where it was"


def test_the_unrolled_gradient_of_many_weights_agrees_with_autograd() -> None:
    """A lower loss that is not quadratic; the reference differentiates through the step itself."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, generator=generator, dtype=torch.float64).requires_grad_() for n in (5, 3)]
    mix = torch.rand(4, generator=generator, dtype=torch.float64).requires_grad_()
    maps = [torch.randn(4, n, generator=generator, dtype=torch.float64) for n in (5, 3)]

    def lower_of(values: list[Tensor], mix: Tensor) -> Tensor:
        return sum((mix @ m * v).sum().tanh() + (v**4).sum() for m, v in zip(maps, values, strict=True))  # type: ignore[return-value]

    def upper_of(values: list[Tensor], mix: Tensor) -> Tensor:
        return sum(((v - 0.3) ** 2).sum() for v in values) + (mix**3).sum()  # type: ignore[return-value]

    slopes = torch.autograd.grad(lower_of(weights, mix), weights, create_graph=True)
    ahead = [w - 0.1 * (g + 0.02 * w) for w, g in zip(weights, slopes, strict=True)]
    wanted_loss = upper_of(ahead, mix)
    (wanted,) = torch.autograd.grad(wanted_loss, [mix])
    loss, gradient = unrolled_gradient(
        weights,
        mix,
        lambda mix: lower_of(weights, mix),
        lambda mix: upper_of(weights, mix),
        velocity=[None, None],
        rate=0.1,
        momentum=0.9,
        weight_decay=0.02,
    )
    torch.testing.assert_close(loss, wanted_loss)
    torch.testing.assert_close(gradient, wanted)


def test_weights_that_the_upper_loss_ignores_leave_its_own_gradient() -> None:
    w, a = torch.tensor(2.0, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    _, gradient = unrolled_gradient(
        [w],
        a,
        lambda a: (w * a) ** 2,
        lambda a: a**2,
        velocity=[None],
        rate=0.1,
        momentum=0.0,
        weight_decay=0.0,
    )
    assert float(gradient) == pytest.approx(1.0) and float(w.detach()) == 2.0


# ---------------------------------------------------------------------------------------------- architectures


def test_all_architectures_are_asked_on_the_same_images() -> None:
    task = make_task()
    evaluator = make(task)
    losses = evaluator.losses([*ARCHS, ARCHS[1]], step=3)
    assert losses.shape == (4, 1)
    assert len(reads_of(task)) == 1 and len(reads_of(task)[0]) == SETTINGS.evaluation_images
    assert losses[1] == losses[3]
    alone = np.concatenate([evaluator.losses([arch], step=3) for arch in ARCHS])
    np.testing.assert_array_equal(alone, losses[:3])


def test_a_thorough_answer_is_of_the_architecture_split_whatever_the_step() -> None:
    task = make_task()
    evaluator = make(task)
    first = evaluator.losses(ARCHS, step=0, thorough=True)
    read = np.concatenate(reads_of(task))
    assert len(read) == len(set(read)) == SETTINGS.thorough_images
    assert set(read) <= set(task.splits["architecture"])
    np.testing.assert_array_equal(evaluator.losses(ARCHS, step=9, thorough=True), first)


def test_an_architecture_is_judged_under_its_own_mixture() -> None:
    evaluator = make()
    images, labels = evaluator._quick.at(0)
    with torch.no_grad():
        wanted = [
            float(F.cross_entropy(evaluator.supernet.forward(images, evaluator._tensor(mix)), labels))
            for mix in map(SPACE.mix_of, ARCHS)
        ]
    np.testing.assert_allclose(evaluator.losses(ARCHS, step=0)[:, 0], wanted, rtol=1e-6)


# ------------------------------------------------------------------------------------------------------ state


def test_it_is_a_function_of_its_seed_and_leaves_torch_s_generator_alone() -> None:
    before = torch.random.get_rng_state()

    def trained(seed: int) -> dict[str, Any]:
        evaluator = make(seed=seed, order="second")
        for step in range(2):
            evaluator.losses_and_grads(mixture(), step=step)
            evaluator.fit(mixture(), step=step)
        return evaluator.state()

    first, again, other = trained(1), trained(1), trained(2)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not all(np.array_equal(first[name], other[name]) for name in first)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("order", ["first", "second"])
def test_a_restored_evaluator_goes_on_with_the_same_bits(order: str) -> None:
    whole = make(order=order)
    for step in range(3):
        whole.fit(mixture(), step=step)
    saved = {name: array.copy() for name, array in whole.state().items()}
    resumed = make(order=order)
    resumed.fit(mixture(5), step=7)  # what it did before does not matter
    resumed.load_state(saved)
    for step in range(3, 6):
        for left, right in zip(
            whole.losses_and_grads(mixture(1), step=step),
            resumed.losses_and_grads(mixture(1), step=step),
            strict=True,
        ):
            np.testing.assert_array_equal(left, right)
        assert whole.fit(mixture(), step=step) == resumed.fit(mixture(), step=step)
    expected, found = whole.state(), resumed.state()
    assert expected.keys() == found.keys() and any(name.startswith("momentum/") for name in found)
    assert all(np.array_equal(expected[name], found[name]) for name in expected)


def test_a_state_without_velocities_forgets_them() -> None:
    evaluator = make()
    saved = evaluator.state()
    assert not any(name.startswith("momentum/") for name in saved)
    fits = [evaluator.fit(mixture(), step=step) for step in range(3)]
    evaluator.load_state(saved)
    assert [evaluator.fit(mixture(), step=step) for step in range(3)] == fits


# -------------------------------------------------------------------------------------------- what is refused


def test_a_space_that_cannot_mix_is_refused_by_name() -> None:
    space = MBConvSpace((3, 8, 8), CLASSES, MBConvSettings(size="tiny"))
    with pytest.raises(ConfigError, match="space 'mbconv' has no such form; take a space of cells"):
        RelaxedSupernet(space, make_task(), SETTINGS, total_steps=1, seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"least_learning_rate": 1.0}, "'least_learning_rate' is at most 'learning_rate'"),
        ({"order": "third"}, "'order' is 'third'"),
        ({"node_norm": True}, "unknown key 'node_norm'"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_settings(RelaxedSettings, settings, "test")


def test_the_catalogue_has_it_and_says_what_it_offers() -> None:
    entry = EVALUATORS["relaxed"]()
    assert entry.offers == {"relaxed"}
    made = entry.make(SPACE, make_task(), entry.settings(batch_size=16), total_steps=1, seed=0, device="cpu")
    assert isinstance(made, RelaxedSupernet) and made.trains and made.noisy
    assert made.edges == SPACE.edges
