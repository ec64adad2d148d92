"""Ten steps towards synthetic targets: what is computed, that the barrier holds, and that answers are
fixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.costs.counts import flops
from pipeline.data.base import ImageTask
from pipeline.errors import ConfigError, StaleArtifact
from pipeline.evaluators import EVALUATORS
from pipeline.evaluators.dps import settings_record
from pipeline.evaluators.eproxy import (
    BarrierBranch,
    Branch,
    Eproxy,
    EproxySettings,
    Member,
    Standard,
    initialise,
    make_eproxy,
)
from pipeline.evaluators.proxies import make_jacov
from pipeline.evaluators.scores import ImageScoreSettings, ScoreEvaluator, generator
from pipeline.evaluators.stages import watching
from pipeline.evaluators.synthetic import BANDS, Feature, target
from pipeline.settings import parse_settings
from pipeline.spaces import SPACES
from pipeline.spaces.nb201 import CONV1, CONV3, NONE, SKIP, NB201Settings, NB201Space
from pipeline.types import Arch, IntArray

SPACE = NB201Space((3, 16, 16), 3, NB201Settings(cells=1, channels=4))
ARCHS = [
    SPACE.smallest,
    SPACE.largest,
    Arch("nb201", (CONV3, NONE, CONV1, SKIP, NONE, CONV3)),
    Arch("nb201", (SKIP, CONV1, CONV3, SKIP, CONV1, SKIP)),
]
SMALL = EproxySettings(
    batch_size=4,
    iterations=4,
    branches=tuple(Branch(channels=c, head_kernel=3) for c in (8, 6, 4)),
    workers=1,
)


class RandomImages:
    """Images of random bytes; reading can be forbidden."""

    def __init__(self, size: int, readable: bool = True) -> None:
        self.pixels = np.random.default_rng(1).integers(0, 256, (60, size, size, 3), dtype=np.uint8)
        self.labels: IntArray = np.arange(60) % 3
        self.readable = readable

    @property
    def shape(self) -> tuple[int, int, int]:
        height, width, channels = self.pixels.shape[1:]
        return height, width, channels

    def read(self, indices: IntArray) -> NDArray[np.uint8]:
        assert self.readable, "images were read"
        return self.pixels[indices]


def make_task(size: int = 16, readable: bool = True) -> ImageTask:
    return ImageTask(
        name="toy",
        classes=("a", "b", "c"),
        source=RandomImages(size, readable),
        splits={"weights": np.arange(40), "architecture": np.arange(40, 50), "test": np.arange(50, 60)},
        mean=(0.5, 0.5, 0.5),
        std=(0.3, 0.3, 0.3),
        flip=True,
        crop_padding=1,
        fingerprint=f"toy{size}",
    )


def make(seed: int = 0, task: ImageTask | None = None, **changed: Any) -> ScoreEvaluator:
    settings = EproxySettings.model_validate({**SMALL.model_dump(), **changed})
    return make_eproxy(SPACE, task or make_task(), settings, total_steps=0, seed=seed, device="cpu")


def images(num: int = 4, size: int = 16) -> Tensor:
    return torch.randn(num, 3, size, size, generator=generator(3))


# ------------------------------------------------------------------------------------------------- the score


def test_the_score_is_what_ten_lines_by_hand_give() -> None:
    """Plain gradient descent with momentum on a copy of network and branches, without the optimiser."""
    settings = SMALL.model_copy(
        update={"alpha": 0.3, "size_exponent": 0.2, "learning_rate": 0.2, "weight_decay": 0.01}
    )
    x = images()
    proxy = Eproxy(SPACE, x, settings, seed=5)
    arch = ARCHS[2]
    torch.manual_seed(5)
    network = SPACE.build(arch).train()
    random = generator(5, 11)
    for weight in (w for w in network.parameters() if w.dim() > 1):
        initialise(weight, settings.network_weights, random)
    with watching(network) as stages:
        branches = [
            BarrierBranch(m.shape[1], b, settings.branch_weights, generator(5, 12, i))
            for i, (m, b) in enumerate(zip(stages(x, 3), settings.branches, strict=True))
        ]
        weights = [w for module in (network, *branches) for w in module.parameters()]
        speed = [torch.zeros_like(w) for w in weights]
        for _ in range(settings.iterations):
            maps = stages(x, 3)
            errors = [((b(m) - y) ** 2).mean() for b, m, y in zip(branches, maps, proxy.targets, strict=True)]
            gradients = torch.autograd.grad(sum(errors, torch.zeros(())), weights, allow_unused=True)
            for w, v, g in zip(weights, speed, gradients, strict=True):
                if g is not None:  # the classifier is in no branch's way
                    v.mul_(0.9).add_(g + (0.01 * w.detach() if w.dim() > 1 else 0))
                    w.data.sub_(0.2 * v)
    last, middle, early = (float(e.detach()) for e in errors)
    share = flops(SPACE.layers(arch)) / flops(SPACE.layers(SPACE.largest))
    expected = (last + middle / 2 + early / 4) * (1 - 0.3 * share) / share**0.2
    assert proxy(arch) == pytest.approx(expected, rel=1e-4)


def test_steps_lower_the_error() -> None:
    calm = {"learning_rate": 0.1}
    first = make(iterations=1, **calm).losses(ARCHS)
    later = make(iterations=10, **calm).losses(ARCHS)
    assert (later < 0.8 * first).all()


def test_alpha_and_the_exponent_favour_large_networks_and_leave_the_error_alone() -> None:
    plain = make(alpha=0.0, size_exponent=0.0).losses(ARCHS)
    share = np.array([[flops(SPACE.layers(a)) / flops(SPACE.layers(SPACE.largest))] for a in ARCHS])
    by_alpha = make(alpha=0.5, size_exponent=0.0).losses(ARCHS)
    np.testing.assert_allclose(by_alpha, plain * (1 - 0.5 * share), rtol=1e-12)
    by_exponent = make(alpha=0.0, size_exponent=0.3).losses(ARCHS)
    np.testing.assert_allclose(by_exponent, plain / share**0.3, rtol=1e-12)


def test_a_diverging_network_ranks_last_and_is_counted() -> None:
    evaluator = make(learning_rate=1e25)
    losses = evaluator.losses(ARCHS)
    assert evaluator.failed == len(ARCHS)
    assert np.isfinite(losses).all() and len(set(losses[:, 0])) == 1
    sound = make()
    assert (sound.losses(ARCHS) < losses).all() and sound.failed == 0


MEMBERS = (
    Member(mean=-0.5, deviation=0.2, learning_rate=0.2, branches=(Branch(channels=8),)),
    Member(mean=0.3, deviation=0.4, learning_rate=0.4, alpha=0.3, branches=(Branch(channels=6),) * 2),
)


def test_members_vote_with_their_log_scores_in_standard_deviations() -> None:
    first, second = (
        make(**member.model_dump(exclude={"mean", "deviation"})).losses(ARCHS)[:, 0] for member in MEMBERS
    )
    expected = ((np.log(first) + 0.5) / 0.2 + (np.log(second) - 0.3) / 0.4) / 2
    evaluator = make(members=MEMBERS)
    np.testing.assert_allclose(evaluator.losses(ARCHS)[:, 0], expected, rtol=1e-9)
    assert evaluator.failed == 0


def test_a_network_that_diverges_in_one_member_ranks_last_and_is_counted() -> None:
    broken = MEMBERS[1].model_copy(update={"learning_rate": 1e25})
    evaluator = make(members=(MEMBERS[0], broken))
    losses = evaluator.losses(ARCHS)
    assert evaluator.failed == len(ARCHS) and np.isfinite(losses).all()
    assert (make(members=(MEMBERS[0], MEMBERS[1])).losses(ARCHS) < losses).all()


JACOV = Standard(mean=0.4, deviation=1.5)


def test_jacov_has_half_of_the_vote_and_sees_the_same_images() -> None:
    settings = ImageScoreSettings(batch_size=SMALL.batch_size, workers=1)
    alone = make_jacov(SPACE, make_task(), settings, total_steps=0, seed=0, device="cpu")
    correlation = alone.losses(ARCHS, step=0)[:, 0] - SMALL.batch_size
    assert (correlation > 0).all()
    expected = (make(members=MEMBERS).losses(ARCHS)[:, 0] + (np.log(correlation) - 0.4) / 1.5) / 2
    evaluator = make(members=MEMBERS, jacov=JACOV)
    np.testing.assert_allclose(evaluator.losses(ARCHS)[:, 0], expected, rtol=1e-9)
    assert evaluator.failed == 0


def test_a_network_whose_images_have_no_gradient_ranks_last_and_is_counted() -> None:
    blind = Arch("nb201", (NONE,) * 6)
    evaluator = make(members=MEMBERS, jacov=JACOV)
    losses = evaluator.losses([blind, *ARCHS])[:, 0]
    assert evaluator.failed == 1 and np.isfinite(losses).all()
    assert (losses[1:] < losses[0]).all()


def test_jacov_does_not_vote_alone() -> None:
    with pytest.raises(ConfigError, match="'jacov' votes beside members, and there are none"):
        parse_settings(EproxySettings, {"jacov": JACOV.model_dump()}, "run.yaml: evaluator")


def test_members_survive_a_settings_file(tmp_path: Path) -> None:
    path = tmp_path / "tuned.yaml"
    stated = SMALL.model_copy(update={"members": MEMBERS, "jacov": JACOV})
    path.write_text(yaml.safe_dump(settings_record(stated)))
    found = parse_settings(EproxySettings, {"settings_file": str(path), "workers": 1}, "run.yaml: evaluator")
    assert (found.members, found.jacov) == (MEMBERS, JACOV) and found.batch_size == SMALL.batch_size
    assert parse_settings(EproxySettings, found.model_dump(mode="json"), "run.yaml") == found


# ----------------------------------------------------------------------------------------------- the barrier


def test_the_barrier_stays_and_gradients_go_through_it() -> None:
    torch.manual_seed(0)
    backbone = nn.Conv2d(3, 5, 3)
    branch = BarrierBranch(5, Branch(channels=6, barrier_kernel=3), "xavier-normal", generator(0))
    before, trained = branch.barrier.clone(), branch.head.weight.detach().clone()
    optimiser = torch.optim.SGD([*backbone.parameters(), *branch.parameters()], lr=0.5, weight_decay=0.1)
    answer = branch(backbone(images()))
    assert answer.shape == (4, 6, 8, 8)
    F.mse_loss(answer, torch.ones_like(answer)).backward()
    optimiser.step()
    assert torch.equal(branch.barrier, before) and not branch.barrier.requires_grad
    assert backbone.weight.grad is not None and float(backbone.weight.grad.abs().min()) > 0
    assert not torch.equal(branch.head.weight, trained)


def test_what_reaches_the_backbone_depends_on_the_barrier() -> None:
    def gradient(sign: float) -> Tensor:
        branch = BarrierBranch(3, Branch(channels=6), "kaiming-uniform", generator(0))
        branch.barrier.mul_(sign)
        x = images().requires_grad_(True)
        (found,) = torch.autograd.grad(branch(x).mean(), x)
        return found

    torch.testing.assert_close(gradient(-1.0), -gradient(1.0))


def test_the_barrier_is_the_same_behind_every_network() -> None:
    narrow, wide = (BarrierBranch(c, Branch(), "xavier-normal", generator(4)) for c in (3, 7))
    assert torch.equal(narrow.barrier, wide.barrier)


@pytest.mark.parametrize(
    ("how", "deviation"),
    [
        ("xavier-uniform", (2 / (9 * 64 + 9 * 32)) ** 0.5),
        ("xavier-normal", (2 / (9 * 64 + 9 * 32)) ** 0.5),
        ("kaiming-uniform", (2 / (9 * 64)) ** 0.5),
        ("kaiming-normal", (2 / (9 * 64)) ** 0.5),
    ],
)
def test_initial_weights(how: Any, deviation: float) -> None:
    weight = torch.empty(32, 64, 3, 3)
    initialise(weight, how, generator(0))
    assert float(weight.std()) == pytest.approx(deviation, rel=0.03)
    bounded = float(weight.abs().max()) <= 3**0.5 * deviation * 1.001
    assert bounded == how.endswith("uniform")


# ------------------------------------------------------------------------------------------ what is compared


def test_a_stage_is_the_last_map_before_the_next_resolution() -> None:
    """Of the largest cell's network: the cells' sums, and the final batch norm."""
    network = SPACE.build(SPACE.largest)
    seen: list[Tensor] = []
    skeleton: Any = network.skeleton
    for module in (skeleton.stages[0][0], skeleton.stages[1][0], skeleton.norm):
        module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with watching(network) as stages:
        found = stages(images(), 3)
    assert [tuple(x.shape[1:]) for x in found] == [(16, 4, 4), (8, 8, 8), (4, 16, 16)]
    assert all(torch.equal(x, y) for x, y in zip(found, reversed(seen), strict=True))


def test_pooled_maps_are_no_stage_and_hooks_do_not_stay() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    with watching(network) as stages:
        (only,) = stages(images(), 3)
    assert only.shape == (4, 4, 16, 16) and float(only.detach().min()) == 0.0
    assert not any(module._forward_hooks for module in network.modules())


def test_a_network_without_feature_maps_is_refused() -> None:
    with watching(nn.Sequential(nn.Flatten(), nn.Linear(768, 2))) as stages:
        with pytest.raises(ConfigError, match="no module inside that puts out a feature map"):
            stages(images(), 3)


def test_with_fewer_resolutions_the_deepest_branches_are_used() -> None:
    class OneMap(NB201Space):
        def build(self, arch: Arch) -> nn.Module:
            return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(256, 3))

    space = OneMap((3, 16, 16), 3, NB201Settings(cells=1, channels=4))
    three, one = SMALL, SMALL.model_copy(update={"branches": SMALL.branches[:1]})
    scores = [Eproxy(space, images(), settings, seed=0).error(SPACE.largest) for settings in (three, one)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("feature", ["dot", "wave-low", "wave-middle", "wave-high", "net"])
def test_targets_are_a_function_of_the_generator_and_scale_with_the_level(feature: Feature) -> None:
    x = images()
    once, twice = (target([feature], level, 8, x, generator(1)) for level in (1.0, 2.0))
    assert once.shape == (4, 8, 8, 8) and once.dtype == torch.float32
    assert torch.equal(2 * once, twice) and torch.equal(once, target([feature], 1.0, 8, x, generator(1)))
    assert not torch.equal(once, target([feature], 1.0, 8, x, generator(2)))
    assert not torch.equal(once[0], once[1]), "images are told apart"


def test_features_add_up() -> None:
    random = generator(0)
    alone = target(["dot"], 1.0, 8, images(), random) + target(["wave-low"], 1.0, 8, images(), random)
    torch.testing.assert_close(target(["dot", "wave-low"], 0.5, 8, images(), generator(0)), 0.5 * alone)


def test_dots_are_signs() -> None:
    dots = target(["dot"], 1.0, 64, images(), generator(0))
    assert set(dots.unique().tolist()) == {-1.0, 1.0} and abs(float(dots.mean())) < 0.05


@pytest.mark.parametrize("feature", sorted(BANDS))
def test_waves_fill_half_of_the_channels_with_frequencies_of_their_band(feature: Feature) -> None:
    """For a sine, s(i−1) + s(i+1) = 2 cos(2πf)·s(i) gives f back."""
    waves = target([feature], 1.0, 32, images(), generator(0)).double().numpy()
    filled = waves[:, np.abs(waves).max(axis=(0, 2, 3)) > 0]
    assert filled.shape[1] == 16 and np.abs(filled).max() <= 1
    low, high = BANDS[feature]
    for axis in (2, 3):
        s = np.moveaxis(filled, (1, axis), (0, 1))
        neighbours, middle = (s[:, :-2] + s[:, 2:]).reshape(16, -1), s[:, 1:-1].reshape(16, -1)
        cosine = (neighbours * middle).sum(axis=1) / (2 * (middle**2).sum(axis=1))
        found = np.arccos(np.clip(cosine, -1, 1)) / (2 * np.pi)
        assert (found >= low - 1e-3).all() and (found <= high + 1e-3).all()
        assert found.std() > 0.1 * (high - low)


def test_net_features_are_standardised_and_of_the_images() -> None:
    features = target(["net"], 1.0, 8, images(), generator(0))
    torch.testing.assert_close(features.mean((0, 2, 3)), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.std((0, 2, 3), correction=0), torch.ones(8))
    other = target(["net"], 1.0, 8, images().flip(3), generator(0))
    assert not torch.allclose(features, other)


# --------------------------------------------------------------------------------------------- fixed answers


def test_answers_depend_on_seed_and_architecture_alone() -> None:
    together = make().losses(ARCHS, step=0)
    assert together.shape == (4, 1) and len(set(together[:, 0])) == 4
    alone = [make().losses([arch], step=7, thorough=True) for arch in reversed(ARCHS)]
    np.testing.assert_array_equal(np.concatenate(alone[::-1]), together)
    assert not np.isin(make(seed=1).losses(ARCHS), together).any()


def test_the_pool_changes_no_bit_nor_torchs_settings() -> None:
    before = (torch.random.get_rng_state(), torch.get_num_threads())
    serial, parallel = make(workers=1).losses(ARCHS), make(workers=3).losses(ARCHS)
    np.testing.assert_array_equal(serial, parallel)
    assert torch.equal(torch.random.get_rng_state(), before[0]) and torch.get_num_threads() == before[1]


def test_it_neither_trains_nor_is_noisy() -> None:
    evaluator = make()
    losses = evaluator.losses(ARCHS)
    assert (evaluator.trains, evaluator.noisy) == (False, False)
    assert evaluator.fit(ARCHS, step=0).loss == pytest.approx(losses.mean())
    np.testing.assert_array_equal(evaluator.losses(ARCHS), losses)


def test_equal_networks_are_scored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Arch] = []
    build = NB201Space.build
    monkeypatch.setattr(NB201Space, "build", lambda self, arch: (built.append(arch), build(self, arch))[1])
    evaluator = make()
    dead_edge = Arch("nb201", (CONV3, NONE, NONE, SKIP, NONE, NONE))  # 0-1 leads nowhere
    losses = evaluator.losses([SPACE.smallest, dead_edge, SPACE.smallest])
    assert built == [SPACE.smallest] and len(set(losses[:, 0])) == 1
    evaluator.losses([dead_edge])
    assert len(built) == 1


def test_a_restored_evaluator_knows_its_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = make()
    losses = evaluator.losses(ARCHS)
    restored = make()
    restored.load_state(evaluator.state())
    monkeypatch.setattr(NB201Space, "build", lambda self, arch: pytest.fail("built again"))
    np.testing.assert_array_equal(restored.losses(ARCHS), losses)
    lost = make(learning_rate=1e25)
    monkeypatch.undo()
    lost.losses(ARCHS[:2])
    again = make(learning_rate=1e25)
    again.load_state(lost.state())
    assert again.failed == 2


@pytest.mark.parametrize("change", [{"seed": 1}, {"alpha": 0.4}, {"images": "noise"}])
def test_scores_of_other_settings_are_refused(change: dict[str, Any]) -> None:
    evaluator = make()
    evaluator.losses(ARCHS[:1])
    with pytest.raises(StaleArtifact, match="other settings, images or another seed"):
        make(**change).load_state(evaluator.state())


def test_an_empty_state_and_an_empty_question() -> None:
    evaluator = make()
    assert evaluator.losses([]).shape == (0, 1)
    make(workers=4).load_state(evaluator.state())


def test_noise_needs_no_image() -> None:
    evaluator = make(task=make_task(readable=False), images="noise")
    losses = evaluator.losses(ARCHS)
    assert np.isfinite(losses).all() and evaluator.failed == 0
    assert (losses != make().losses(ARCHS)).all()


def test_only_training_images_are_read() -> None:
    class Watched(RandomImages):
        def read(self, indices: IntArray) -> NDArray[np.uint8]:
            assert set(indices.tolist()) <= set(range(40))
            return super().read(indices)

    task = make_task()
    object.__setattr__(task, "source", Watched(16))
    assert make(task=task).losses(ARCHS[:1]).shape == (1, 1)


@pytest.mark.parametrize("name", sorted(SPACES))
def test_it_scores_every_space(name: str) -> None:
    entry = SPACES[name]
    space = entry.make((3, 16, 16), 3, entry.settings())
    settings = SMALL.model_copy(update={"iterations": 2})
    evaluator = make_eproxy(space, make_task(), settings, total_steps=0, seed=0, device="cpu")
    archs = [space.smallest, next(iter(space.uniform()))]
    losses = evaluator.losses(archs)
    assert np.isfinite(losses).all() and evaluator.failed == 0
    assert losses[0] != losses[1] or space.canonical(archs[0]) == space.canonical(archs[1])


# -------------------------------------------------------------------------------------------------- settings


def test_the_catalogue_has_it() -> None:
    entry = EVALUATORS["eproxy"]()
    assert entry.settings is EproxySettings and entry.make is make_eproxy


def test_a_settings_file_fills_what_is_not_stated(tmp_path: Path) -> None:
    path = tmp_path / "tuned.yaml"
    path.write_text(yaml.safe_dump({"learning_rate": 0.7, "alpha": -0.2, "branches": [{"channels": 16}]}))
    found = parse_settings(EproxySettings, {"settings_file": str(path), "alpha": 0.4}, "run.yaml: evaluator")
    assert (found.learning_rate, found.alpha, found.branches) == (0.7, 0.4, (Branch(channels=16),))
    assert found.settings_file is None, "resolved: the run does not need the file any more"
    assert parse_settings(EproxySettings, found.model_dump(mode="json"), "run.yaml") == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("alfa: 1", r"tuned\.yaml: unknown key 'alfa' \(did you mean 'alpha'\?\)"),
        ("learning_rate: -1", r"tuned\.yaml: 'learning_rate' is -1"),
        ("- 1", r"tuned\.yaml: is not a settings file of eproxy"),
        ("settings_file: other.yaml", r"tuned\.yaml: is not a settings file of eproxy"),
        (None, r"tuned\.yaml: cannot be read"),
    ],
)
def test_a_bad_settings_file_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "tuned.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        parse_settings(EproxySettings, {"settings_file": str(path)}, "run.yaml: evaluator")


@pytest.mark.parametrize(
    "values",
    [
        {"branches": []},
        {"branches": [{}] * 4},
        {"branches": [{"features": []}]},
        {"branches": [{"features": ["dot", "dot"]}]},
        {"branches": [{"head_kernel": 5}]},
        {"images": "none"},
    ],
)
def test_settings_that_mean_nothing_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="run.yaml: "):
        parse_settings(EproxySettings, values, "run.yaml")
