"""How the latency of ONNX files is measured on this device.

The process is pinned, every network is warmed up until it is stable, and then visited in several rounds of
shuffled order. A visit is a block of runs, its value their lower quartile: on a shared core, interruptions
and the cold caches after them are in the upper part. Blocks of one reference network stand between every
few visits: a visit counts when the reference ran alike before and after it, and as a ratio to that
reference, so that the clock speed of the moment cancels. A network's latency is the median of its ratios
times the reference's nominal latency.

Chosen by experiment: 20 networks of 0.01-0.9 ms, one pinned thread, on a 2-core machine that others kept
busy. Between any two of 10 fresh processes (load 2.5-4.5) a latency differs by 1.7 % at the 95th percentile
and 4.7 % at most. Values from the same recorded runs in 14 processes (load 1-3.6): 2.8 % and 4.2 % this
way, 3.8 % and 7.8 % with medians as the value of a block.

`time_models` does the work in this process and needs numpy and onnxruntime alone (Python >= 3.9), so that
it runs on any device; `measure` runs it in a child process, out of the way of a search's threads.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import numpy as np

from pipeline import errors
from pipeline.devices.hardware import (
    cpu_model,
    gpu_models,
    load_average,
    quiet_cores,
    resident_bytes,
    usable_cores,
)
from pipeline.devices.session import CPU, NVIDIA, RuntimeSettings, open_session
from pipeline.errors import BudgetlineError, ExportError, MeasurementError, ProfileError

if TYPE_CHECKING:
    from pipeline.types import LatencyRecord, Progress

ROUNDS = 5
MIN_ROUNDS = 3  # fewer undisturbed visits than this are no measurement
ROUNDS_LIMIT = 4  # times `rounds`, repetitions of disturbed visits included
MAX_SPREAD = 0.10
MAX_DRIFT = 0.10  # of the reference; what is more is waited for, and said
REFUSED_DRIFT = 0.5  # not a clock that moved: another machine, or a very busy one

WARMUP_RUNS = 10
WARMUP_SECONDS = 0.2
WARMUP_SPREAD = 0.05
WARMUP_LIMIT_SECONDS = 2.0

BLOCK_SECONDS = 0.03
BLOCK_RUNS = 5
SETTLING_RUNS = 2  # untimed runs at the head of a block: caches, and thread pools that went to sleep
REFERENCE_EVERY = 4  # visits between two blocks of the reference

REFERENCE_AGREEMENT = 0.03  # before and after a visit
REFERENCE_LEVEL = 0.03  # above the reference's level over the whole measurement

ATTEMPTS = 4
PAUSE_S = 15.0
CLOCK_S = 120.0  # of pauses for a clock that has moved, all measurements together

Advance = Callable[[int, str], None]
Timed = TypeVar("Timed")
Samples = Any  # float64 array of run times in ms; numpy's own type is no use to Python 3.9

_INPUT_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
}


# ------------------------------------------------------------------------------------------------ one network


class Network:
    """An open ONNX file with a random input of its shape, ready to run.

    `resident_bytes` is by how much opening it and warming it up has grown this process, on a CPU; what the
    runtime needs once is in the first file's of a kind."""

    def __init__(self, path: Path, settings: RuntimeSettings, rng: np.random.Generator) -> None:
        self.path = path
        self.sha256 = _sha256(path)
        self.warmup: dict[str, Any] = {}
        self.first_run_ms = float("nan")
        self.resident_bytes: int | None = None
        self._resident_before = resident_bytes() if settings.provider == CPU else None
        session = open_session(
            path,
            provider=settings.provider,
            provider_options=settings.provider_options,
            threads=settings.threads,
            spinning=settings.spinning,
        )
        feeds = {node.name: _random_input(node, settings.batch, path, rng) for node in session.get_inputs()}
        bind = _bound_run if settings.provider in NVIDIA else _plain_run
        self.run = bind(session, feeds, settings)

    def warm_up(self) -> None:
        """Run until the medians of the last two tenths of the runs agree, at most 2 s."""
        began = time.perf_counter()
        times = [self._timed_run()]
        self.first_run_ms = times[0]
        while True:
            times.append(self._timed_run())
            seconds = time.perf_counter() - began
            stable = len(times) > WARMUP_RUNS and _settled(times)
            if (stable and seconds >= WARMUP_SECONDS) or seconds >= WARMUP_LIMIT_SECONDS:
                break
        self.warmup = {"runs": len(times), "seconds": round(seconds, 3), "stable": stable}
        if self._resident_before is not None:
            self.resident_bytes = (resident_bytes() or 0) - self._resident_before

    def block(self) -> Samples:
        """Run times in ms of one block: 30 ms of runs, and at least five."""
        for _ in range(SETTLING_RUNS):
            self.run()
        times: list[float] = []
        while sum(times) < BLOCK_SECONDS * 1e3 or len(times) < BLOCK_RUNS:
            times.append(self._timed_run())
        return np.array(times)

    def _timed_run(self) -> float:
        began = time.perf_counter_ns()
        self.run()
        return (time.perf_counter_ns() - began) / 1e6


def _settled(times: list[float]) -> bool:
    window = max(5, len(times) // 10)
    last, before = np.median(times[-window:]), np.median(times[-2 * window : -window])
    return bool(abs(last - before) <= WARMUP_SPREAD * min(last, before))


def _random_input(node: Any, batch: int, path: Path, rng: np.random.Generator) -> Any:
    """An array of the input's shape; a free first axis is the batch."""
    if node.type not in _INPUT_TYPES:
        raise ExportError(
            f"{path}: input '{node.name}' is {node.type}; only images can be fed when measuring"
        )
    free = [axis for axis, size in enumerate(node.shape) if not isinstance(size, int)]
    if free not in ([], [0]):
        raise ExportError(f"{path}: input '{node.name}' has shape {node.shape}: only the batch may be free")
    shape = [batch if axis in free else size for axis, size in enumerate(node.shape)]
    if shape and shape[0] != batch:
        raise ProfileError(
            f"{path} is fixed to batch {shape[0]}, but 'batch' is {batch}: export it for that batch"
        )
    dtype = np.dtype(_INPUT_TYPES[node.type])
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    return rng.integers(0, 128, shape).astype(dtype)


def _plain_run(session: Any, feeds: Mapping[str, Any], settings: RuntimeSettings) -> Callable[[], None]:
    def run() -> None:
        session.run(None, feeds)

    return run


def _bound_run(session: Any, feeds: Mapping[str, Any], settings: RuntimeSettings) -> Callable[[], None]:
    """Inputs and outputs stay on the GPU and each run ends with a synchronisation: the network is timed, the
    copies between host and device are not."""
    import onnxruntime

    device = int(settings.provider_options.get("device_id", 0))
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", device))
    for node in session.get_outputs():
        binding.bind_output(node.name, "cuda", device)

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run


# ------------------------------------------------------------------------------------------------ many rounds


@dataclass(frozen=True)
class Visit:
    """One block of a network's runs, and the reference's values before and after it, in ms."""

    samples: Samples
    before_ms: float
    after_ms: float

    @property
    def ratio(self) -> float:
        return _value_ms(self.samples) / ((self.before_ms + self.after_ms) / 2)

    def undisturbed(self, level_ms: float) -> bool:
        """Whether the reference ran alike on both sides, and about as fast as it does on the whole."""
        slower, faster = max(self.before_ms, self.after_ms), min(self.before_ms, self.after_ms)
        return slower <= faster * (1 + REFERENCE_AGREEMENT) and slower <= level_ms * (1 + REFERENCE_LEVEL)


@dataclass
class Measurement:
    """All visits so far, per network, and all blocks of the reference."""

    visits: list[list[Visit]]
    reference_ms: list[float] = field(default_factory=list)

    @property
    def level_ms(self) -> float:
        """What the reference takes when nothing disturbs it: the lower quartile of its blocks."""
        return float(np.quantile(self.reference_ms, 0.25))

    @property
    def reference_spread(self) -> float:
        """(worst - level) / level of the reference's blocks."""
        return max(self.reference_ms) / self.level_ms - 1

    def kept(self, network: int) -> list[Visit]:
        return [visit for visit in self.visits[network] if visit.undisturbed(self.level_ms)]


def collect(
    networks: Sequence[Network],
    reference: Network,
    *,
    rounds: int,
    rng: np.random.Generator,
    advance: Advance = lambda steps, note: None,
) -> Measurement:
    """Visit every network until it has `rounds` undisturbed visits, in at most four times as many rounds."""
    measurement = Measurement([[] for _ in networks])
    for number in range(rounds * ROUNDS_LIMIT):
        wanting = [i for i in range(len(networks)) if number == 0 or len(measurement.kept(i)) < rounds]
        if not wanting:
            break
        _one_round(networks, reference, rng.permutation(wanting).tolist(), measurement)
        if number < rounds:
            advance(len(networks), f"round {number + 1}")
        else:
            advance(0, f"{len(wanting)} disturbed, again")
    return measurement


def _one_round(
    networks: Sequence[Network], reference: Network, order: Sequence[int], measurement: Measurement
) -> None:
    before_ms = _value_ms(reference.block())
    measurement.reference_ms.append(before_ms)
    for start in range(0, len(order), REFERENCE_EVERY):
        group = order[start : start + REFERENCE_EVERY]
        blocks = [networks[i].block() for i in group]
        after_ms = _value_ms(reference.block())
        measurement.reference_ms.append(after_ms)
        for place, i in enumerate(group):
            measurement.visits[i].append(Visit(blocks[place], before_ms, after_ms))
        before_ms = after_ms


def summarise(
    network: Network, visits: Sequence[Visit], kept: Sequence[Visit], *, level_ms: float, nominal_ms: float
) -> dict[str, Any]:
    """The fields of a LatencyRecord, without its context. `latency_ms` is what budgets are judged by; p50
    and p95 are over the kept runs as they were, not corrected for the moment's clock."""
    ratios = np.array([visit.ratio for visit in kept])
    runs = np.concatenate([visit.samples for visit in kept])
    return {
        "latency_ms": float(np.median(ratios)) * nominal_ms,
        "p50_ms": float(np.quantile(runs, 0.5)),
        "p95_ms": float(np.quantile(runs, 0.95)),
        "spread": _spread(ratios),
        "runs": int(runs.size),
        "rounds": len(kept),
        "discarded_rounds": len(visits) - len(kept),
        "first_run_ms": network.first_run_ms,
        "drift": level_ms / nominal_ms,
        "sha256": network.sha256,
    }


def _value_ms(samples: Samples) -> float:
    return float(np.quantile(samples, 0.25))


def _values_ms(visits: Sequence[Visit]) -> list[list[float]]:
    return [[_value_ms(visit.samples), visit.before_ms, visit.after_ms] for visit in visits]


def _spread(ratios: Samples) -> float:
    """Interquartile range over median."""
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    return float((high - low) / middle)


def time_models(
    models: Sequence[Path],
    reference: Path | None,
    settings: RuntimeSettings,
    *,
    rounds: int = ROUNDS,
    seed: int = 0,
    reference_nominal_ms: float | None = None,
    max_spread: float = MAX_SPREAD,
    with_visits: bool = False,
    advance: Advance = lambda steps, note: None,
) -> list[dict[str, Any]]:
    """Measure in this process, which it pins; one record per model with the fields of a LatencyRecord, and
    where asked for, under `visits`, every kept visit as ms of the network and of the reference before and
    after it.

    Raises ProviderError, ProfileError or ExportError where nothing can be measured, and MeasurementError
    when too few visits were undisturbed or the interquartile range of a network's ratios is above
    `max_spread`."""
    rng = np.random.default_rng(seed)
    load_before = load_average()
    cores = _pin(settings)
    yardstick = Network(reference or models[0], settings, rng)
    yardstick.warm_up()
    networks = []
    for model in models:
        networks.append(Network(model, settings, rng))
        networks[-1].warm_up()
        advance(1, "warm-up")
    with _no_garbage_collection():
        measurement = collect(networks, yardstick, rounds=rounds, rng=rng, advance=advance)
    _require_quiet(networks, measurement, max_spread, cores)
    level_ms = measurement.level_ms
    context = {
        **_context(settings, cores),
        "load_before": load_before,
        "load_after": load_average(),
        "reference": {
            "sha256": yardstick.sha256,
            "now_ms": level_ms,
            "nominal_ms": reference_nominal_ms or level_ms,
            "spread": measurement.reference_spread,
        },
    }
    return [
        {
            **summarise(
                network,
                measurement.visits[i],
                measurement.kept(i),
                level_ms=level_ms,
                nominal_ms=reference_nominal_ms or level_ms,
            ),
            "context": {**context, "warmup": network.warmup, "resident_bytes": network.resident_bytes},
            **({"visits": _values_ms(measurement.kept(i))} if with_visits else {}),
        }
        for i, network in enumerate(networks)
    ]


def _require_quiet(
    networks: Sequence[Network], measurement: Measurement, max_spread: float, cores: Sequence[int]
) -> None:
    for i, network in enumerate(networks):
        kept = measurement.kept(i)
        seen = len(measurement.visits[i])
        where = f"{network.path.name} on core {', '.join(map(str, cores))}" if cores else network.path.name
        if len(kept) < min(MIN_ROUNDS, seen):
            raise MeasurementError(
                f"the machine is too disturbed to time {where}: {len(kept)} of {seen} rounds were quiet, the "
                f"reference network moved by {measurement.reference_spread:.0%} (load {load_average()}); "
                "stop other work and run the same command again"
            )
        spread = _spread(np.array([visit.ratio for visit in kept]))
        if spread > max_spread:
            raise MeasurementError(
                f"{where} does not repeat: its rounds spread by {spread:.0%}, allowed is {max_spread:.0%} "
                f"(load {load_average()}); stop other work and run the same command again"
            )


class Patience:
    """How a busy or slow machine is waited for: `attempts` with pauses between.

    A shared machine's clock that has moved stays there for hours, or comes and goes. So where it was waited
    for in vain, the speed that it came to is what is waited for next, until the machine is once more about as
    fast as when its costs were measured; and it is waited for `clock_s` seconds in all, since latencies are
    corrected for it anyway."""

    def __init__(
        self,
        attempts: int = ATTEMPTS,
        pause_s: float = PAUSE_S,
        sleep: Callable[[float], None] = time.sleep,
        clock_s: float = CLOCK_S,
    ) -> None:
        self._attempts, self._pause_s, self._sleep = attempts, pause_s, sleep
        self._usual_drift = 1.0
        self._clock_s = clock_s

    def wait_for(
        self,
        measured: Callable[[], list[Timed]],
        drift_of: Callable[[Timed], float],
        say: Callable[[str], None],
    ) -> list[Timed]:
        """Records of a machine that is quiet and about as fast as it was; a drift that stays is left to the
        caller to judge.

        Raises MeasurementError where the last attempt does."""
        for left in range(self._attempts - 1, -1, -1):
            try:
                records = measured()
            except MeasurementError as disturbed:
                if not left:
                    raise
                say(f"{disturbed}; waiting to try again")
            else:
                drift = max(map(drift_of, records), default=1.0)
                out_of_patience = self._clock_s <= 0 and drift <= 1 + REFUSED_DRIFT
                if drift <= self._usual_drift * (1 + MAX_DRIFT) or not left or out_of_patience:
                    self._usual_drift = drift if drift > 1 + MAX_DRIFT else 1.0
                    return records
                self._clock_s -= self._pause_s
                say(f"the machine is {drift:.2f} times slower than when profiled; waiting")
            self._sleep(self._pause_s)
        raise AssertionError("the last attempt returns or raises")


def _pin(settings: RuntimeSettings) -> tuple[int, ...]:
    """Keep this process on as many quiet cores as it has threads; empty where it cannot, or a GPU works."""
    available = len(usable_cores())
    if settings.threads > available:
        raise ProfileError(
            f"'threads' is {settings.threads}, but this process may use only {available} of the cores; "
            "lower it, or give the process more cores"
        )
    if settings.provider in NVIDIA or not hasattr(os, "sched_setaffinity"):
        return ()
    cores = quiet_cores(settings.threads)
    os.sched_setaffinity(0, cores)
    return cores


def _context(settings: RuntimeSettings, cores: Sequence[int]) -> dict[str, Any]:
    import onnxruntime

    return {
        **settings.to_json(),
        "onnxruntime": onnxruntime.__version__,
        "cpu": cpu_model(),
        "gpu": [] if settings.provider == CPU else list(gpu_models()),
        "cores": list(cores),
        "copies_timed": settings.provider not in NVIDIA,
    }


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as failure:
        raise MeasurementError(f"{path}: cannot be read ({failure.strerror or failure})") from None


# -------------------------------------------------------------------------------------------- a child process


def measure(
    models: Sequence[Path],
    reference: Path | None,
    settings: RuntimeSettings,
    *,
    rounds: int = ROUNDS,
    seed: int = 0,
    reference_nominal_ms: float | None = None,
    max_spread: float = MAX_SPREAD,
    progress: Progress | None = None,
) -> list[LatencyRecord]:
    """`time_models` in a fresh child process; one record per model, in order.

    `reference` (else the first model) is the network that every round is compared with;
    `reference_nominal_ms` is what it took when the costs in use were measured
    (`context["reference"]["now_ms"]` then), so that latencies of different hours can be compared. `drift`
    is what it takes now over that. Raises what `time_models` raises."""
    from pipeline.types import LatencyRecord  # at call time: the rest of this module runs on Python 3.9

    if not models:
        return []
    request = {
        "models": [str(path) for path in models],
        "reference": None if reference is None else str(reference),
        "settings": settings.to_json(),
        "rounds": rounds,
        "seed": seed,
        "reference_nominal_ms": reference_nominal_ms,
        "max_spread": max_spread,
    }
    return [LatencyRecord(**record) for record in _in_child(request, len(models) * (rounds + 1), progress)]


def _in_child(request: Mapping[str, Any], steps: int, progress: Progress | None) -> list[dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        advance: Advance = lambda steps, note: None  # noqa: E731
        if progress is not None:
            advance = stack.enter_context(progress.track("measure", steps))
        stderr = stack.enter_context(tempfile.TemporaryFile("w+"))
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "pipeline.devices.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=_child_environment(),
        )
        stack.callback(_end, child)
        assert child.stdin is not None and child.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once; what it said is told below
            child.stdin.write(json.dumps(request) + "\n")
            child.stdin.flush()
        records = _follow(child.stdout, advance)
        if records is None:
            child.wait()
            raise MeasurementError(
                f"the measuring process ended (exit {child.returncode}): {_last_line(stderr)}"
            )
        return records


def _follow(lines: IO[str], advance: Advance) -> list[dict[str, Any]] | None:
    """Read the child's messages until its records; None when it ends without them."""
    for line in lines:
        message = json.loads(line)
        if "error" in message:
            raise _error(message["error"], message["text"])
        if "records" in message:
            records: list[dict[str, Any]] = message["records"]
            return records
        advance(message["steps"], message["note"])
    return None


def _error(name: str, text: str) -> BudgetlineError:
    kind = getattr(errors, name, MeasurementError)
    error: BudgetlineError = kind(text)
    return error


def _child_environment() -> dict[str, str]:
    """This process' environment without what tunes its own threads and memory, so that a latency does not
    depend on who asks for it; and with this package on the path."""
    tuning = ("MALLOC_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "GLIBC_TUNABLES")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(tuning)}
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, [environment.get("PYTHONPATH")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(paths)}


def _end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def _last_line(stderr: IO[str]) -> str:
    stderr.seek(0)
    lines = stderr.read().strip().splitlines()
    return lines[-1] if lines else "it said nothing"
