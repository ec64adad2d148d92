"""Eproxy: how fast an untrained network learns to reproduce synthetic feature maps, in ten steps.

Y. Li, J. Li, C. Han, P. Li, J. Xiong, D. Chen, "Extensible Proxy for Efficient NAS", 2022, arXiv
2210.09459.

On one fixed batch of N images, the outputs of the network's last, middle and early stage are resized to
8×8. Branch i (0 is the last stage): a trained k_h×k_h convolution, ReLU, batch norm, then the barrier, a
k_b×k_b convolution with random weights that no optimiser touches though gradients flow through it.
Network and branches take SGD steps on Σ_i MSE_i against the targets Y_i
(`pipeline.evaluators.synthetic`). The score, lower is better, is E·(1 − αs)·s^−β with s =
FLOPs/FLOPs_max and E = Σ_i MSE_i / 2^i, read before the last step would be made.

β is ours, 0 in the paper. E alone thinks too well of the very small, which learn fast, and 1 − αs hardly
tells them from each other.

What the paper leaves open is chosen here: where a stage ends is found by watching the network
(`pipeline.evaluators.stages`), so that no space has to say, and a network with fewer resolutions than
there are branches uses its deepest ones; maps are resized bilinearly; FLOPs_max is the space's largest
network's; an E that is not finite, or more than DIVERGED times that of putting out zeros, counts as
diverged and ranks last. The default settings were chosen on 60 cells of NAS-Bench-201, which
benchmarks/proxies_nb201.py leaves out when it judges them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Generator, Tensor, nn

from pipeline.costs.counts import flops
from pipeline.data.base import ImageTask
from pipeline.devices.profile import read_strict_yaml
from pipeline.errors import ConfigError
from pipeline.evaluators.proxies import jacov, worst_jacov_loss
from pipeline.evaluators.scores import (
    ImageScoreSettings,
    ScoreEvaluator,
    build_seeded,
    fixed_images,
    generator,
    images_identity,
    workers_on,
)
from pipeline.evaluators.stages import Stages, watching
from pipeline.evaluators.synthetic import SIZE, Feature, target
from pipeline.settings import Settings, parse_settings
from pipeline.spaces.base import SearchSpace
from pipeline.types import Arch, Json

LEAST_SCORE = 1e-12
DIVERGED = 10.0
"""An E of so many times the targets' own mean square is taken for divergence."""

Weights = Literal["xavier-uniform", "xavier-normal", "kaiming-uniform", "kaiming-normal"]
Kernel = Literal[1, 3, 7]

_NETWORK, _BRANCH, _TARGET = 11, 12, 13
"""Streams of random numbers, besides those in scores.py."""


# -------------------------------------------------------------------------------------------------- settings


class Branch(Settings):
    """What one stage is asked to reproduce, and through what."""

    features: tuple[Feature, ...] = Field(("net",), min_length=1)
    head_kernel: Kernel = 1
    barrier_kernel: Kernel = 1
    channels: int = Field(64, ge=1, le=4096)
    level: float = Field(1.0, gt=0)

    @field_validator("features")
    @classmethod
    def _no_feature_twice(cls, features: tuple[Feature, ...]) -> tuple[Feature, ...]:
        if len(set(features)) < len(features):
            raise ValueError("names a feature twice")
        return features


class Genes(Settings):
    """What `pipeline.evaluators.dps` searches over. `branches` are for the last, the middle and the early
    stage."""

    learning_rate: float = Field(1.2, gt=0)
    alpha: float = Field(0.0, ge=-1, lt=1)
    size_exponent: float = Field(0.15, ge=0, le=1)
    network_weights: Weights = "kaiming-normal"
    branch_weights: Weights = "xavier-normal"
    branches: tuple[Branch, ...] = Field((Branch(), Branch(), Branch()), min_length=1, max_length=3)


class Standard(Settings):
    """`mean` and `deviation` of a voter's log scores over the architectures that it was chosen on."""

    mean: float
    deviation: float = Field(gt=0)


class Member(Genes, Standard):
    """One of several proxies that vote."""


class EproxySettings(ImageScoreSettings, Genes):
    """Genes, and what the search over them leaves alone. Where there are `members`, they stand for the genes
    beside them; with `jacov`, half of the vote is that of the proxy of this name on the same images.
    `settings_file` is what `budgetline dps` wrote: its values stand where none is stated
    beside it, and in the resolved settings they stand by themselves."""

    settings_file: str | None = None
    batch_size: int = Field(16, ge=2)
    iterations: int = Field(10, ge=1)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(4e-5, ge=0)
    members: tuple[Member, ...] = ()
    jacov: Standard | None = None

    def of(self, member: Member) -> EproxySettings:
        """Of one member alone."""
        genes = {name: getattr(member, name) for name in Genes.model_fields}
        return self.model_copy(update={**genes, "members": (), "jacov": None})

    @model_validator(mode="after")
    def _a_vote_needs_members(self) -> EproxySettings:
        if self.jacov is not None and not self.members:
            raise ValueError("'jacov' votes beside members, and there are none")
        return self

    @model_validator(mode="before")
    @classmethod
    def _read_file(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("settings_file") is None:
            return values
        path = Path(str(values["settings_file"]))
        found = read_strict_yaml(path)
        if not isinstance(found, dict) or "settings_file" in found:
            raise ConfigError(
                f"{path}: is not a settings file of eproxy; `budgetline dps --known FILE` writes one"
            )
        parse_settings(cls, found, str(path))
        return {**found, **values, "settings_file": None}


# -------------------------------------------------------------------------------------------------- branches


class BarrierBranch(nn.Module):
    """Feature maps (N, C, H, W) → (N, channels, 8, 8). The barrier is a buffer: no parameter, so in
    reach of no optimiser."""

    barrier: Tensor

    def __init__(self, channels_in: int, settings: Branch, weights: Weights, random: Generator) -> None:
        super().__init__()
        channels, kernel = settings.channels, settings.head_kernel
        self.register_buffer("barrier", torch.empty(channels, channels, *[settings.barrier_kernel] * 2))
        self.head: nn.Conv2d = nn.utils.skip_init(  # type: ignore[no-untyped-call]
            nn.Conv2d, channels_in, channels, kernel, padding=kernel // 2, bias=False
        )
        self.norm = nn.BatchNorm2d(channels, track_running_stats=False)
        for weight in (self.barrier, self.head.weight):  # the barrier first: the same behind every network
            initialise(weight, weights, random)

    def forward(self, features: Tensor) -> Tensor:
        resized = F.interpolate(features, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
        normalised = self.norm(F.relu(self.head(resized)))
        return F.conv2d(normalised, self.barrier, padding=self.barrier.shape[-1] // 2)


@torch.no_grad()
def initialise(weight: Tensor, how: Weights, random: Generator) -> None:
    """Glorot and Bengio 2010 (xavier), or He et al. 2015 for rectifiers by what comes in (kaiming)."""
    match how:
        case "xavier-uniform":
            nn.init.xavier_uniform_(weight, generator=random)
        case "xavier-normal":
            nn.init.xavier_normal_(weight, generator=random)
        case "kaiming-uniform":
            nn.init.kaiming_uniform_(weight, nonlinearity="relu", generator=random)
        case "kaiming-normal":
            nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=random)


# ----------------------------------------------------------------------------------------------------- score


class Eproxy:
    """The score as a function of the architecture; may be called by several threads at a time."""

    def __init__(
        self, space: SearchSpace, images: Tensor, settings: EproxySettings, *, seed: int, device: str = "cpu"
    ) -> None:
        self._space, self._settings, self._seed = space, settings, seed
        self._device = torch.device(device)
        self._images = images.to(self._device)
        self.targets = [
            target(b.features, b.level, b.channels, images, generator(seed, _TARGET, i)).to(self._device)
            for i, b in enumerate(settings.branches)
        ]
        self._largest_flops = flops(space.layers(space.largest))
        self._smallest_share = flops(space.layers(space.smallest)) / self._largest_flops

    @property
    def worst(self) -> float:
        """No score of a network that has not diverged is more."""
        zeros = weighted(float(y.square().mean()) for y in self.targets)
        largest_factor = (1 + abs(self._settings.alpha)) * self._smallest_share**-self._settings.size_exponent
        return float(DIVERGED * zeros * largest_factor)

    def __call__(self, arch: Arch) -> float:
        """The score; not finite where the steps diverged."""
        return self.corrected(arch, self.error(arch))

    def corrected(self, arch: Arch, error: float) -> float:
        """E·(1 − αs)·s^−β."""
        share = max(flops(self._space.layers(arch)) / self._largest_flops, self._smallest_share)
        return float(error * (1 - self._settings.alpha * share) * share**-self._settings.size_exponent)

    def error(self, arch: Arch) -> float:
        """E, whatever α and β are."""
        network = build_seeded(self._space, arch, self._seed)
        random = generator(self._seed, _NETWORK)
        for parameter in network.parameters():
            if parameter.dim() > 1:
                initialise(parameter, self._settings.network_weights, random)
        with watching(network.to(self._device)) as stages:
            return self._learn(network, stages)

    def _learn(self, network: nn.Module, stages: Stages) -> float:
        features = stages(self._images, len(self._settings.branches))
        branches = self._branches_for(features)
        optimiser = _optimiser([network, *branches], self._settings)
        errors = self._errors(branches, features)
        for _ in range(self._settings.iterations - 1):
            total = torch.stack(errors).sum()
            if not math.isfinite(float(total.detach())):
                break
            optimiser.zero_grad(set_to_none=True)
            total.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            errors = self._errors(branches, stages(self._images, len(branches)))
        return weighted(float(error.detach()) for error in errors)

    def _branches_for(self, features: Sequence[Tensor]) -> list[BarrierBranch]:
        weights = self._settings.branch_weights
        return [
            BarrierBranch(x.shape[1], branch, weights, generator(self._seed, _BRANCH, i)).to(self._device)
            for i, (x, branch) in enumerate(zip(features, self._settings.branches, strict=False))
        ]

    def _errors(self, branches: Sequence[BarrierBranch], features: Sequence[Tensor]) -> list[Tensor]:
        compared = zip(branches, features, self.targets, strict=False)
        return [F.mse_loss(branch(x), y) for branch, x, y in compared]


class Ensemble:
    """Several proxies: the mean of their log scores, each in its own standard deviations, and half of that
    where `jacov` has the other half. May be called by several threads at a time."""

    def __init__(
        self, space: SearchSpace, images: Tensor, settings: EproxySettings, *, seed: int, device: str = "cpu"
    ) -> None:
        self._members = [
            (Eproxy(space, images, settings.of(member), seed=seed, device=device), member)
            for member in settings.members
        ]
        self._jacov = None if settings.jacov is None else Correlation(space, images, seed=seed, device=device)
        self._standard = settings.jacov

    @property
    def worst(self) -> float:
        """No score of a network that has not diverged in any is more."""
        vote = fmean(standardised(proxy.worst, member) for proxy, member in self._members)
        return vote if self._jacov is None else self._joined(vote, self._jacov.worst)

    def __call__(self, arch: Arch) -> float:
        """The score; not finite where the steps of a member diverged, or an image has no gradient."""
        total = 0.0
        for proxy, member in self._members:
            score = proxy(arch)
            if not (math.isfinite(score) and score <= proxy.worst):
                return math.inf
            total += standardised(score, member)
        vote = total / len(self._members)
        return vote if self._jacov is None else self._joined(vote, self._jacov(arch))

    def _joined(self, vote: float, correlation: float) -> float:
        assert self._standard is not None
        return joined(vote, correlation, self._standard) if math.isfinite(correlation) else math.inf


class Correlation:
    """`jacov` as a voter, on images (N, C, H, W): what the correlation of the N gradients adds to minus its
    score, which is N where there is none. Positive, the less the better, so that it has a logarithm. May be
    called by several threads at a time."""

    def __init__(self, space: SearchSpace, images: Tensor, *, seed: int, device: str = "cpu") -> None:
        self._space, self._seed, self._device = space, seed, device
        self._images = images.to(device)

    @property
    def worst(self) -> float:
        return worst_jacov_loss(len(self._images)) - len(self._images)

    def __call__(self, arch: Arch) -> float:
        """Not finite where an image has no gradient."""
        network = build_seeded(self._space, arch, self._seed).to(self._device)
        return -jacov(network, self._images) - len(self._images)


def standardised(score: float, standard: Standard) -> float:
    """The log of a voter's score in standard deviations from its mean."""
    return (math.log(max(score, LEAST_SCORE)) - standard.mean) / standard.deviation


def joined(vote: float, correlation: float, standard: Standard) -> float:
    """Half the members' vote, half that of `jacov`."""
    return (vote + standardised(correlation, standard)) / 2


def standard_of(scores: Iterable[float]) -> Standard:
    """Over finite scores."""
    logs = [math.log(max(score, LEAST_SCORE)) for score in scores]
    return Standard(mean=fmean(logs), deviation=max(pstdev(logs), LEAST_SCORE))


def proxy_of(
    space: SearchSpace, images: Tensor, settings: EproxySettings, *, seed: int, device: str = "cpu"
) -> Eproxy | Ensemble:
    """The score that the settings mean."""
    kind = Ensemble if settings.members else Eproxy
    return kind(space, images, settings, seed=seed, device=device)


def weighted(errors: Iterable[float]) -> float:
    """Σ_i e_i / 2^i."""
    return sum(error * 0.5**i for i, error in enumerate(errors))


def _optimiser(modules: Sequence[nn.Module], settings: EproxySettings) -> torch.optim.SGD:
    """Weight decay on what has more than one dimension."""
    weights = [parameter for module in modules for parameter in module.parameters()]
    return torch.optim.SGD(
        [
            {"params": [w for w in weights if w.dim() > 1], "weight_decay": settings.weight_decay},
            {"params": [w for w in weights if w.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        momentum=settings.momentum,
        foreach=True,
    )


# ------------------------------------------------------------------------------------------------- evaluator


def make_eproxy(
    space: SearchSpace, task: ImageTask, settings: EproxySettings, *, total_steps: int, seed: int, device: str
) -> ScoreEvaluator:
    """`total_steps` has no bearing: nothing is trained between two scores."""
    score = proxy_of(space, fixed_images(task, settings, seed), settings, seed=seed, device=device)
    silent = set() if settings.jacov else {"jacov"}
    identity: Json = {
        "proxy": "eproxy",
        **settings.model_dump(mode="json", exclude={"workers", "settings_file", *silent}),
        **images_identity(task, settings, seed),
    }
    return ScoreEvaluator(
        space, score, worst=score.worst, identity=identity, workers=workers_on(device, settings)
    )
