"""The resumable training loop: one network, one recipe, the best weights by the architecture split.

A step's batch, augmentation, perturbation and dropout depend on (seed, step) only, and a checkpoint holds
everything else the next step reads (weights, momentum, averages, best weights, sums). So a run that was
killed anywhere and started again ends with the same bits as one that was not (on a CPU, with the same number
of threads).

Several ranks train one network on their slices of the same batches, through DistributedDataParallel: the
gradient is the whole batch's, whatever the number of ranks. Batch norm takes the statistics of a rank's own
slice, and its running statistics are those of rank 0's: unlike all else they depend on the number of ranks,
little while slices are not small. The architecture split is divided among the ranks too.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.artifacts import sha256_json
from pipeline.data.base import ImageTask
from pipeline.data.batches import Batches
from pipeline.errors import ConfigError, DivergedTraining
from pipeline.evaluators import attack
from pipeline.ranks import ALONE, Ranks, part_of
from pipeline.train.assess import Assessment, Perturb, evaluate
from pipeline.train.ema import Ema
from pipeline.train.graphs import Graphed, Step, tuned_convolutions
from pipeline.train.recipe import Adversarial, Distil, Recipe, decay_groups
from pipeline.types import Arrays, Checkpoint, IntArray, Json, Progress

_REPORT_SECONDS = 0.5
_DROPOUT, _PERTURBATION = 0, 3  # third words of the seeds of a step; those of batches are 1 and 2
_LEAST_IMAGES = 2  # of a rank in a step: batch norm needs more than one
Weights = Literal["raw", "ema"]


@dataclass(frozen=True, slots=True)
class Epoch:
    """`train_loss` is the mean over the epoch's steps of what was minimised. Accuracies are top-1 on the
    architecture split in per cent, losses its mean cross entropy, under attack where the recipe is
    adversarial; None where it was not read or no average is kept."""

    epoch: int
    train_loss: float
    accuracy: float | None
    loss: float | None
    ema_accuracy: float | None
    ema_loss: float | None


@dataclass(frozen=True)
class TrainRecord:
    """How a network was trained. `accuracy` (per cent) and `loss` are the kept weights' on the architecture
    split as it is; `weights` says whether those are the trained or the averaged ones. `seconds` is the time
    of training and evaluation, over interruptions too; `images_per_second` is of training alone."""

    epochs: float
    best_epoch: int
    weights: Weights
    accuracy: float
    loss: float
    seconds: float
    images_per_second: float
    seed: int
    recipe: Recipe
    history: tuple[Epoch, ...]

    def to_json(self) -> Json:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return fields | {
            "recipe": self.recipe.model_dump(mode="json"),
            "history": [asdict(epoch) for epoch in self.history],
        }

    @classmethod
    def from_json(cls, record: Json) -> TrainRecord:
        """Reads what `to_json` made; keys that are not of this record are left alone."""
        fields = {name: record[name] for name in cls.__dataclass_fields__}
        fields["recipe"] = Recipe.model_validate(record["recipe"])
        fields["history"] = tuple(Epoch(**epoch) for epoch in record["history"])
        return cls(**fields)


@runtime_checkable
class Aided(Protocol):
    """A network with parts that help to train it and do not ship, such as an auxiliary head or dropped paths.
    They are there between `begin_training` and `end_training`, and never in evaluation mode."""

    @property
    def auxiliary_weight(self) -> float:
        """Weight of the auxiliary logits' cross entropy in the loss."""
        ...

    def begin_training(self) -> None:
        """Random weights come from torch's global generator."""
        ...

    def set_progress(self, share: float) -> None:
        """How much of the training is done, 0 to 1."""
        ...

    def training_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits and, where there is a head for them, auxiliary ones, both of shape (N, C)."""
        ...

    def end_training(self) -> None: ...


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's global generators start from `seed` inside the block and are put back after it."""
    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def training_loss(
    logits_NC: Tensor,
    labels_N: Tensor,
    label_smoothing: float,
    distil: Distil | None,
    teacher_NC: Tensor | None,
) -> Tensor:
    """Smoothed cross entropy; with a teacher's logits, mixed with the divergence from them (see Distil)."""
    hard = F.cross_entropy(logits_NC, labels_N, label_smoothing=label_smoothing)
    if teacher_NC is None or distil is None:
        return hard
    student = F.log_softmax(logits_NC / distil.temperature, 1)
    teacher = F.log_softmax(teacher_NC / distil.temperature, 1)
    soft = F.kl_div(student, teacher, reduction="batchmean", log_target=True) * distil.temperature**2
    return (1 - distil.weight) * hard + distil.weight * soft


def retrain(
    network: nn.Module,
    task: ImageTask,
    recipe: Recipe,
    *,
    seed: int,
    checkpoint: Checkpoint,
    progress: Progress,
    label: str,
    device: str = "cpu",
    teacher: nn.Module | None = None,
    checkpoint_seconds: float = 20.0,
    ranks: Ranks = ALONE,
) -> TrainRecord:
    """Train on the weights split, choose by the architecture split, leave the best weights in `network`.

    The first weights are the caller's: build the network under `seeded(seed)`. `label` names the work to a
    person. A checkpoint of another training (recipe, seed, data, first weights, teacher) is reported and not
    used. The network ends in evaluation mode. Several `ranks` must be given the same checkpoint, of which
    only one may write.

    Raises DivergedTraining when a loss or weight is not a number: no checkpoint is written after that, so the
    last one is of a good state."""
    if teacher is not None and recipe.distil is None:
        raise ConfigError(f"{label}: a teacher was given, but the recipe has no 'distil' section; add one")
    if isinstance(network, Aided):
        with seeded(seed):
            network.begin_training()
    network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    run = _Run(network, task, recipe, seed, label, device, teacher, ranks)
    run.resume(checkpoint, progress)
    run.agree_on_start()
    with (
        seeded(seed),
        tuned_convolutions(torch.device(device)),
        progress.track(label, run.steps, run.step) as advance,
    ):
        run.train(checkpoint, advance, checkpoint_seconds)
    return run.finish()


class _Run:
    """One training in progress: everything a checkpoint holds, and the tensors it is about."""

    def __init__(
        self,
        network: nn.Module,
        task: ImageTask,
        recipe: Recipe,
        seed: int,
        label: str,
        device: str,
        teacher: nn.Module | None,
        ranks: Ranks,
    ) -> None:
        self.ranks = ranks
        self.network, self.task, self.recipe = network, task, recipe
        self.aided = network if isinstance(network, Aided) else None
        self.seed, self.label, self.device = seed, label, device
        self.batch_size = min(recipe.batch_size, len(task.splits["weights"]))
        self.batches = Batches(
            task,
            "weights",
            self.batch_size,
            seed=seed,
            augment=True,
            drop_last=True,
            cutout=recipe.cutout,
            device=device,
        )
        self.steps = recipe.steps(len(task.splits["weights"]))
        self.epochs = math.ceil(self.steps / self.batches.steps_per_epoch)
        over_ranks = self._over_ranks()
        self.forward = torch.compile(over_ranks) if recipe.compile else over_ranks
        self.teacher = teacher
        if teacher is not None:
            teacher.to(device=device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        graphed = self._is_always_the_same()
        self.optimizer = torch.optim.SGD(
            decay_groups(network, recipe.weight_decay),
            lr=torch.tensor(recipe.lr, device=device) if graphed else recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            fused=True,
        )
        self.update: Step = Graphed(self._update, torch.device(device)) if graphed else self._update
        self.ema = Ema(network, recipe.ema_decay) if recipe.ema_decay > 0 else None
        self.made_for: Json = {  # what must be the same for a checkpoint to be of this training
            "recipe": recipe.model_dump(mode="json"),
            "seed": seed,
            "data": task.fingerprint,
            "augmentation": task.augmentation,
            "first weights": _digest(network),
            "teacher": _digest(teacher) if teacher is not None else None,
        }
        self.step = 0
        self.history: list[Epoch] = []
        self.best: dict[str, Tensor] = {}
        self.best_score: tuple[float, float] | None = None  # accuracy, −loss: larger is better
        self.best_epoch = 0
        self.best_weights: Weights = "raw"
        self.epoch_loss = 0.0
        self.seconds = self.training_seconds = 0.0
        self._unread: list[Tensor] = []

    # ----------------------------------------------------------------------------------------------- the loop

    def train(
        self, checkpoint: Checkpoint, advance: Callable[[int, str], None], checkpoint_seconds: float
    ) -> None:
        self.network.train()
        report_seconds = min(_REPORT_SECONDS, checkpoint_seconds)
        last = saved = time.monotonic()
        while self.step < self.steps:
            self._train_step()
            ends_epoch = self.step % self.batches.steps_per_epoch == 0 or self.step == self.steps
            if not ends_epoch and time.monotonic() - last < report_seconds:
                continue
            advance(self._read_losses(), self._note())
            self.training_seconds += time.monotonic() - last
            if ends_epoch:
                self._close_epoch()
            now = time.monotonic()
            self.seconds += now - last
            if now - saved >= checkpoint_seconds or self.step == self.steps:
                self._save(checkpoint)
                saved = time.monotonic()
            last = time.monotonic()

    def _train_step(self) -> None:
        self._set_rate(self.recipe.learning_rate(self.step, self.steps))
        torch.manual_seed(_step_seed(self.seed, self.step, _DROPOUT, self.ranks.rank))
        images_NCHW, labels_N = self._own_part(*self.batches.at(self.step))
        loss = self.update(images_NCHW.to(self.device), labels_N.to(self.device))
        if self.ema is not None:
            self.ema.update(self.step)
        self.step += 1
        self._unread.append(self._of_all_ranks(loss, len(labels_N)))

    def _set_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def _update(self, images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
        """One optimiser step; the loss it was taken on."""
        loss = self._loss(self._perturbed(images_NCHW, labels_N), labels_N)
        self.optimizer.zero_grad(set_to_none=True)
        self._backward(loss, len(labels_N))
        if self.recipe.clip_norm > 0:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip_norm, foreach=True)
        self.optimizer.step()
        return loss.detach()

    def _is_always_the_same(self) -> bool:
        """Whether all steps are alike, on a GPU, so that one can be recorded and repeated. Paths that are
        dropped more and more, attacks and other ranks have the host take part."""
        return (
            torch.device(self.device).type == "cuda"
            and self.recipe.cuda_graph
            and self.recipe.adversarial is None
            and not self.recipe.compile
            and self.aided is None
            and self.ranks.size == 1
        )

    def _perturbed(self, images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
        """What the recipe makes of a batch. It is attacked in evaluation mode: no running statistics change,
        nothing is dropped."""
        if self.recipe.adversarial is None:
            return images_NCHW
        words = (self.seed, self.step, _PERTURBATION, self.ranks.rank)
        generator = torch.Generator().manual_seed(_step_seed(*words))
        self.network.eval()
        strength = self._strength(self.recipe.adversarial)
        perturbed = attack.one_step(self.network, images_NCHW, labels_N, **strength, generator=generator)
        self.network.train()
        return perturbed

    def _strength(self, adversarial: Adversarial) -> dict[str, Any]:
        return {"epsilon": adversarial.epsilon / attack.LEVELS, "pixels": attack.Pixels.of(self.task)}

    def _loss(self, images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
        bf16 = self.recipe.precision == "bf16"
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=bf16):
            logits_NC, auxiliary_NC = self._logits(images_NCHW)
            teacher_NC = None
            if self.teacher is not None:
                with torch.no_grad():
                    teacher_NC = self.teacher(images_NCHW).float()
        smoothing = self.recipe.label_smoothing
        loss = training_loss(logits_NC.float(), labels_N, smoothing, self.recipe.distil, teacher_NC)
        if self.aided is None or auxiliary_NC is None:
            return loss
        auxiliary = F.cross_entropy(auxiliary_NC.float(), labels_N, label_smoothing=smoothing)
        return loss + self.aided.auxiliary_weight * auxiliary

    def _logits(self, images_NCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.aided is not None:
            self.aided.set_progress(self.step / self.steps)
        return self.forward(images_NCHW)

    def _read_losses(self) -> int:
        """Fetch the losses of the steps since the last call and add them up, in order. Returns how many."""
        losses = torch.stack(self._unread).tolist()
        self._unread.clear()
        first = self.step - len(losses)
        for offset, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise self._diverged(first + offset, f"the training loss is {loss}")
            self.epoch_loss += loss
        return len(losses)

    def _close_epoch(self) -> None:
        epoch = math.ceil(self.step / self.batches.steps_per_epoch)
        train_loss = self.epoch_loss / (self.step - (epoch - 1) * self.batches.steps_per_epoch)
        self.epoch_loss = 0.0
        raw = ema = None
        if self.recipe.evaluates(epoch, self.epochs):
            self._settle(epoch)
            raw = self._judge(self.network, epoch, "raw")
            ema = self._judge(self.ema.module, epoch, "ema") if self.ema is not None else None
        self.history.append(
            Epoch(
                epoch,
                train_loss,
                raw.accuracy if raw else None,
                raw.loss if raw else None,
                ema.accuracy if ema else None,
                ema.loss if ema else None,
            )
        )

    def _judge(self, network: nn.Module, epoch: int, weights: Weights) -> Assessment:
        """Evaluate, and keep the weights if they are the best so far."""
        adversarial = self.recipe.adversarial
        perturb = partial(attack.fgsm, network, **self._strength(adversarial)) if adversarial else None
        result = self._evaluate(network, perturb)
        if not math.isfinite(result.loss):
            raise self._diverged(self.step - 1, f"the loss on the architecture split is {result.loss}")
        score = (result.accuracy, -result.loss)
        if self.best_score is None or score > self.best_score:
            self.best_score, self.best_epoch, self.best_weights = score, epoch, weights
            self.best = {name: value.detach().clone() for name, value in network.state_dict().items()}
        return result

    def _note(self) -> str:
        epoch = (self.step - 1) // self.batches.steps_per_epoch
        best = f", best {self.best_score[0]:.2f} %" if self.best_score else ""
        return f"epoch {epoch + 1}/{self.epochs}{best}"

    def _diverged(self, step: int, what: str) -> DivergedTraining:
        lr = self.recipe.learning_rate(step, self.steps)
        epoch = step // self.batches.steps_per_epoch + 1
        kept = f"epoch {self.best_epoch} with {self.best_score[0]:.2f} %" if self.best_score else "none yet"
        return DivergedTraining(
            f"{self.label}: {what} at step {step + 1} of {self.steps} (epoch {epoch}, lr {lr:.3g})\n"
            f"best so far: {kept}; lower the recipe's 'lr' (now {self.recipe.lr:g}) or set 'clip_norm', and "
            "remove what was trained by the recipe as it is"
        )

    def finish(self) -> TrainRecord:
        assert self.best_score is not None, "the last epoch is always evaluated"
        self.network.load_state_dict(self.best)
        if self.aided is not None:
            self.aided.end_training()
        self.network.eval()
        accuracy, negative_loss = self.best_score
        if self.recipe.adversarial is not None:
            clean = self._evaluate(self.network)
            accuracy, negative_loss = clean.accuracy, -clean.loss
        return TrainRecord(
            epochs=self.recipe.epochs,
            best_epoch=self.best_epoch,
            weights=self.best_weights,
            accuracy=accuracy,
            loss=-negative_loss,
            seconds=self.seconds,
            images_per_second=self.steps * self.batch_size / max(self.training_seconds, 1e-9),
            seed=self.seed,
            recipe=self.recipe,
            history=tuple(self.history),
        )

    # -------------------------------------------------------------------------------------------------- ranks

    def _over_ranks(self) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
        """The pass that training takes; with several ranks its backward pass averages their gradients."""
        plain = _TrainingPass(self.network)
        if self.ranks.size == 1:
            return plain.forward
        least = _LEAST_IMAGES * self.ranks.size
        smallest = min(self.batch_size, len(self.task.splits["architecture"]))
        if smallest < least:
            raise ConfigError(
                f"{self.label}: {self.ranks.size} ranks need batches, and an architecture split, of {least} "
                f"images at least, and one has {smallest}; start fewer ranks, or set a larger batch_size"
            )
        return nn.parallel.DistributedDataParallel(
            plain, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    def _own_part(self, images_NCHW: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        part = part_of(len(labels_N), self.ranks)
        return images_NCHW[part], labels_N[part]

    def _backward(self, loss: Tensor, images: int) -> None:
        """Ranks are averaged as equals: a part that is larger by an image counts that much more."""
        weight = images * self.ranks.size / self.batch_size
        (loss if weight == 1 else weight * loss).backward()  # type: ignore[no-untyped-call]

    def _of_all_ranks(self, loss: Tensor, images: int) -> Tensor:
        """The loss of the whole batch."""
        if self.ranks.size > 1:
            loss = loss * (images / self.batch_size)
            self.ranks.sum(loss)
        return loss

    def _settle(self, epoch: int) -> None:
        """Make ranks alike, which they are but for batch norm's running statistics: those of rank 0 are
        everyone's now. Raises RanksDisagree where something else differs."""
        if self.ranks.size == 1:
            return
        networks = {"network": self.network} | ({"average": self.ema.module} if self.ema is not None else {})
        for buffer in (buffer for network in networks.values() for buffer in network.buffers()):
            self.ranks.send(buffer, 0)()
        digests = {name: _digest(network) for name, network in networks.items()}
        self.ranks.agree(f"{self.label}, epoch {epoch}", digests)

    def _evaluate(self, network: nn.Module, perturb: Perturb | None = None) -> Assessment:
        """On the architecture split, of which every rank takes its part."""
        part = self.task.splits["architecture"][part_of(len(self.task.splits["architecture"]), self.ranks)]
        task = self.task if self.ranks.size == 1 else _with_architecture_split(self.task, part)
        found = evaluate(network, task, "architecture", device=self.device, perturb=perturb)
        if self.ranks.size == 1:
            return found
        own = [round(found.accuracy * found.images / 100), found.loss * found.images, found.images]
        correct, loss, images = self.ranks.sum_array(np.array(own, dtype=float)).tolist()
        return Assessment(100 * correct / images, loss / images, int(images))

    def agree_on_start(self) -> None:
        """What is trained, and from where on, is the same on all ranks. Raises RanksDisagree."""
        start = self.made_for | {"step to go on from": self.step}
        self.ranks.agree(self.label, {what: sha256_json(value) for what, value in start.items()})

    # -------------------------------------------------------------------------------------------- checkpoints

    def _save(self, checkpoint: Checkpoint) -> None:
        if not all(bool(torch.isfinite(p).all()) for p in self.network.parameters()):
            raise self._diverged(self.step - 1, "weights are no longer finite")
        checkpoint.save(*self._state())

    def _state(self) -> tuple[Arrays, Json]:
        arrays = _to_arrays("network", self.network.state_dict()) | _to_arrays("best", self.best)
        arrays |= _to_arrays("momentum", self._momentum())
        if self.ema is not None:
            arrays |= _to_arrays("ema", self.ema.module.state_dict())
        return arrays, {
            "made_for": self.made_for,
            "step": self.step,
            "epoch_loss": self.epoch_loss,
            "history": [asdict(epoch) for epoch in self.history],
            "best": [self.best_score, self.best_epoch, self.best_weights],
            "seconds": self.seconds,
            "training_seconds": self.training_seconds,
        }

    def resume(self, checkpoint: Checkpoint, progress: Progress) -> None:
        """Go on from a checkpoint of this very training, if there is one."""
        loaded = checkpoint.load()
        if loaded is None:
            return
        arrays, record = loaded
        found = record.get("made_for", {})
        differs = [what for what, value in self.made_for.items() if found.get(what) != value]
        if differs:
            progress.say(
                f"{self.label}: the checkpoint is of another {' and '.join(differs)}; training starts anew"
            )
            return
        self.network.load_state_dict(_from_arrays("network", arrays))
        self.best = {name: value.to(self.device) for name, value in _from_arrays("best", arrays).items()}
        self._load_momentum(_from_arrays("momentum", arrays))
        if self.ema is not None:
            self.ema.module.load_state_dict(_from_arrays("ema", arrays))
        self.step, self.epoch_loss = int(record["step"]), float(record["epoch_loss"])
        self.history = [Epoch(**epoch) for epoch in record["history"]]
        score, self.best_epoch, self.best_weights = record["best"]
        self.best_score = (float(score[0]), float(score[1])) if score else None
        self.seconds, self.training_seconds = float(record["seconds"]), float(record["training_seconds"])

    def _trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.network.named_parameters() if p.requires_grad)

    def _momentum(self) -> dict[str, Tensor]:
        states = ((name, self.optimizer.state[p]) for name, p in self._trained_parameters())
        return {name: state["momentum_buffer"] for name, state in states if "momentum_buffer" in state}

    def _load_momentum(self, buffers: dict[str, Tensor]) -> None:
        for name, parameter in self._trained_parameters():
            if name in buffers:
                buffer = torch.empty_like(parameter).copy_(buffers[name])
                self.optimizer.state[parameter]["momentum_buffer"] = buffer


class _TrainingPass(nn.Module):
    """A network as DistributedDataParallel has to see it, which only takes gradients of a `forward`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images_NCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits and, where there is a head for them, auxiliary ones."""
        if isinstance(self.network, Aided):
            return self.network.training_logits(images_NCHW)
        return self.network(images_NCHW), None


def _with_architecture_split(task: ImageTask, indices: IntArray) -> ImageTask:
    return replace(task, splits={**task.splits, "architecture": indices})


def _to_arrays(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Copies, so that what is saved cannot change while it is written."""
    return {f"{prefix}/{name}": np.array(value.detach().cpu().numpy()) for name, value in tensors.items()}


def _from_arrays(prefix: str, arrays: Arrays) -> dict[str, Tensor]:
    start = f"{prefix}/"
    return {
        name.removeprefix(start): torch.from_numpy(np.ascontiguousarray(value)).reshape(value.shape)
        for name, value in arrays.items()
        if name.startswith(start)
    }


def _digest(network: nn.Module) -> str:
    """Content hash over names, shapes and values of the network's state."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _step_seed(*words: int) -> int:
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)
