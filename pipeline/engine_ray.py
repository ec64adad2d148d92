"""Jobs of a stage as tasks of a Ray cluster, on whatever nodes there are (`--engine ray`).

A task sees nothing of the driver's disk. It gets the files that its job reads as bytes, lays them out as a
run folder of its own on its node, does the job as a process of `pipeline.engine` would, and streams back what
happens: how far it is, checkpoints as they are saved, the files that it made, its answer. The driver alone
writes the run folder. The stream is a Ray generator, so nothing stands between the two that could be lost.

A task whose node is lost is started again by the driver, from the newest checkpoint that came back. Ray's own
retries would give it its first arguments again and want the same stream of it.

Files are timed on nodes that carry the device's label, a custom resource `device:NAME` of which a task takes
one: a node that was started with one times one thing after the other, and no other node is ever asked.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import queue
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline import __version__
from pipeline.artifacts import inside, write_bytes
from pipeline.devices.environment import MALLOC, timing_environment
from pipeline.devices.measure import MAX_SPREAD, ROUNDS, measure
from pipeline.devices.profile import DeviceProfile
from pipeline.devices.session import NVIDIA, RuntimeSettings
from pipeline.engine import Advance, Engine, Reads, told_error
from pipeline.engine_worker import Messages, outcome
from pipeline.errors import BudgetlineError, ConfigError, DataError, ProfileError, WorkerLost
from pipeline.run import Run, open_run, prepare_compute
from pipeline.settings import Settings, parse_settings
from pipeline.types import Json, LatencyRecord, Progress

if TYPE_CHECKING:
    from pipeline.costs.table import Measure

LOOK_SECONDS = 1.0
"""How often a task looks for a checkpoint to send back."""
PATIENCE_SECONDS = 10.0
"""After so long without a message the driver looks whether the nodes that its tasks need are still there."""
MOST_LOSSES = 3
"""So often a job is started again: after that it is more likely to kill its nodes than to be unlucky."""
TUNING = (*MALLOC, "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Variables that training wants when its process starts; a task has those that the driver has."""

Do = Callable[[Path, Json, Progress], Json]
"""What a task does on its node: in a folder, by a request, saying how far it is."""


class RaySettings(Settings):
    """`address` is a cluster's; without one RAY_ADDRESS, else the cluster that this machine belongs to, else
    one is started on this machine alone. Every task that trains or exports asks for `cpus`, which is how many
    threads it computes on, for `gpus` and for `resources` by the names that nodes were started with."""

    address: str | None = None
    cpus: int = Field(1, ge=1)
    gpus: float = Field(0, ge=0)
    resources: dict[str, float] = Field({})


def parse_ray_settings(address: str | None, resources: str | None, trains_on: str) -> RaySettings:
    """From the command line: `resources` is `cpus=2,gpus=1,NAME=AMOUNT`, by default one CPU, and one GPU
    where networks train on one. Raises ConfigError."""
    where = f"--task-resources {resources}"
    found: dict[str, str] = {}
    for part in filter(None, (resources or "").split(",")):
        name, _, amount = (word.strip() for word in part.partition("="))
        if not name or not amount:
            raise ConfigError(f"{where}: expected NAME=AMOUNT, as in cpus=2,gpus=1, got '{part}'")
        found[name] = amount
    if trains_on not in ("cpu", "cuda"):
        raise ConfigError(
            f"--device {trains_on}: a Ray task sees only the GPUs given to it; say --device cuda"
        )
    if address is not None and address.startswith("ray://"):
        raise ConfigError(
            f"--ray-address {address}: Ray's client cannot stream results; start this command on a node of "
            "the cluster, which `ray start --address=…` makes of any machine"
        )
    own: Json = {"gpus": 1 if trains_on == "cuda" else 0}
    own |= {name: found.pop(name) for name in ("cpus", "gpus") if name in found}
    return parse_settings(RaySettings, {"address": address, **own, "resources": found}, where)


@contextlib.contextmanager
def connected(
    settings: RaySettings, profiles: Sequence[DeviceProfile], progress: Progress
) -> Iterator[RayCluster]:
    """The cluster that `settings` name; a connection that this process has already is used, and kept.

    A cluster that has to be started, of this machine alone, is labelled as each of the `profiles`' devices.
    Raises ConfigError."""
    ray = _ray()
    if ray.is_initialized():
        yield RayCluster(ray, settings, progress)
        return
    quiet: Json = {"log_to_driver": False, "logging_level": "error"}
    try:
        try:
            ray.init(settings.address or "auto", **quiet)
        except ConnectionError:
            if settings.address is not None or os.environ.get("RAY_ADDRESS"):
                raise
            progress.say("no Ray cluster here: one is started, of this machine alone")
            labels = {label(profile.name): 1.0 for profile in profiles if _is_timed(profile)}
            ray.init("local", resources=labels, include_dashboard=False, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as failure:
        address = settings.address or os.environ.get("RAY_ADDRESS")
        raise ConfigError(
            f"Ray cluster {address}: cannot be reached ({_first_line(failure)}); `ray status` on its head "
            "node tells whether it runs"
        ) from None
    try:
        yield RayCluster(ray, settings, progress)
    finally:
        ray.shutdown()


def _ray() -> ModuleType:
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise ConfigError(
            "--engine ray: Ray is not installed; pip install '.[ray]' in the checkout, on every node"
        ) from None


def label(device: str) -> str:
    """The custom resource of the nodes that a device's files are timed on."""
    return f"device:{device}"


def _is_timed(profile: DeviceProfile) -> bool:
    return profile.measures_latency and not profile.elsewhere


# ------------------------------------------------------------------------------------------------- the driver


@dataclass
class _Task:
    """A piece of work and how it fares. `files` are read when it starts, so that a second start has the
    checkpoints of the first."""

    index: int
    name: str
    do: Do
    request: Json
    files: Callable[[], dict[str, bytes]]
    needs: Mapping[str, float]
    losses: int = 0
    steps: int = 0
    node: str = "none yet"


@dataclass
class RayCluster:
    """A connection to a cluster: `pipeline.engine.Cluster`."""

    ray: Any
    settings: RaySettings
    progress: Progress
    _environments: dict[str, Json] = field(default_factory=dict)

    def engine(self, module: str, root: Path, data: str | None, reads: Reads, at_once: int | None) -> Engine:
        return RayTasks(self, module, root, data, reads, at_once)

    def stopwatch(self, profile: DeviceProfile) -> Measure:
        return RayStopwatch(self, profile)

    def environment(self, profile: DeviceProfile) -> Json:
        """What of the device's node decides a latency, beside the profile."""
        if profile.name not in self._environments:
            asked = _Task(0, f"look at {profile.name}", _look, {}, dict, self.needs_device(profile))
            self._environments[profile.name] = self.do("look", [asked], 0)[0]
        return self._environments[profile.name]

    def needs_device(self, profile: DeviceProfile) -> dict[str, float]:
        """What timing asks of a node: the label alone, so that a device may be a node that does nothing else.

        Raises ProfileError where it is not said how many threads a device uses that is another machine."""
        if profile.threads is None and self._carriers(profile) - {
            self.ray.get_runtime_context().get_node_id()
        }:
            raise ProfileError(
                f"profile '{profile.name}': 'threads' is not stated, which means the cores of this machine; "
                "on a cluster say how many the device uses, for example threads: 4"
            )
        return {label(profile.name): 1.0, "GPU": float(profile.provider in NVIDIA)}

    def _carriers(self, profile: DeviceProfile) -> set[str]:
        needs = {label(profile.name): 1.0}
        return {n["NodeID"] for n in self.ray.nodes() if n["Alive"] and _has(n["Resources"], needs)}

    def do(
        self,
        title: str,
        tasks: Sequence[_Task],
        steps_each: int,
        root: Path | None = None,
        at_once: int | None = None,
    ) -> list[Json]:
        """The tasks' answers, in order; what they made is written to `root`. At most `at_once` are started at
        a time, by default all, which then wait for their resources.

        The first error ends the rest and is raised; what they had saved is kept."""
        waiting, running, answers = deque(tasks), dict[Any, _Task](), dict[int, Json]()
        with self.progress.track(title, len(tasks) * steps_each) as advance:
            try:
                while waiting or running:
                    while waiting and len(running) < (at_once or len(tasks)):
                        task = waiting.popleft()
                        running[self._start(task)] = task
                    ready, _ = self.ray.wait(list(running), num_returns=1, timeout=PATIENCE_SECONDS)
                    if not ready:
                        self._refuse_unmet(running.values())
                    for stream in ready:
                        task = running[stream]
                        message = self._next(stream, task, advance)
                        if message is None:
                            waiting.append(running.pop(stream))
                        elif "answer" in message:
                            answers[task.index] = message["answer"]
                            del running[stream]
                        elif "error" in message:
                            del running[stream]  # it has ended: its process can do another task
                            raise _with_node(told_error(message), task.node)
                        else:
                            self._hear(message, task, advance, root)
            finally:
                for stream in running:
                    self.ray.cancel(stream, force=True)
        return [answers[task.index] for task in tasks]

    def _start(self, task: _Task) -> Any:
        self._refuse_unmet([task])
        needs = dict(task.needs)
        variables = {name: os.environ[name] for name in TUNING if name in os.environ}
        remote = self.ray.remote(_work).options(
            name=task.name,
            num_cpus=needs.pop("CPU", 0),
            num_gpus=needs.pop("GPU", 0),
            resources=needs,
            num_returns="streaming",
            max_retries=0,
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": variables} if variables else None,
        )
        return remote.remote(task.do, {**task.request, "version": __version__}, task.files())

    def _next(self, stream: Any, task: _Task, advance: Advance) -> Json | None:
        """The next message of a task, None where it is lost and has to start again."""
        errors = self.ray.exceptions
        lost = (
            errors.NodeDiedError,
            errors.WorkerCrashedError,
            errors.OutOfMemoryError,
            errors.ObjectLostError,
        )
        try:
            message: Json = self.ray.get(next(stream))
        except lost as loss:
            advance(-task.steps, f"{task.name}: lost")
            task.losses, task.steps = task.losses + 1, 0
            what = f"{task.name}: lost on node {task.node} ({type(loss).__name__})"
            if task.losses > MOST_LOSSES:
                raise WorkerLost(
                    f"{what}, {task.losses} times in all: {_first_line(loss)}; finished work is kept: run "
                    "the same command again, with fewer tasks at a time (--workers) if memory ran out"
                ) from None
            self.progress.say(f"{what}; it starts again from the last checkpoint that came back")
            return None
        except errors.RayTaskError as failure:
            if "failed to import on the worker" in str(failure):
                raise ConfigError(
                    f"a node of the cluster cannot import budgetline {__version__}; install it on every one: "
                    "pip install '.[ray]' in a checkout of this version"
                ) from None
            raise
        except errors.RayError as failure:
            raise WorkerLost(f"{task.name}: Ray could not do it: {_first_line(failure)}") from None
        return message

    def _hear(self, message: Json, task: _Task, advance: Advance, root: Path | None) -> None:
        if "node" in message:
            task.node = self._name_of(message["node"])
            if root is not None:
                self.progress.say(f"{task.name} on node {task.node}")
        elif "say" in message:
            self.progress.say(f"{message['say']} (node {task.node})")
        elif "steps" in message:
            task.steps += message["steps"]
            advance(message["steps"], message["note"])
        elif root is not None:
            path = inside(root, message["file"])
            if message["content"] is None:
                path.unlink(missing_ok=True)
            else:
                write_bytes(path, message["content"])

    def _refuse_unmet(self, tasks: Iterable[_Task]) -> None:
        """Where no node could ever do a task, Ray would wait for one in silence. Raises ConfigError."""
        nodes = [node for node in self.ray.nodes() if node["Alive"]]
        for task in tasks:
            needs = {name: amount for name, amount in task.needs.items() if amount > 0}
            if not any(_has(node["Resources"], needs) for node in nodes):
                raise ConfigError(
                    _advice(task.name, needs, nodes, self.ray.get_runtime_context().gcs_address)
                )

    def _name_of(self, node_id: str) -> str:
        return next((str(n["NodeName"]) for n in self.ray.nodes() if n["NodeID"] == node_id), node_id)


class RayTasks:
    """An engine whose jobs are tasks: `pipeline.engine.Engine`. `reads` tells the files of the run folder
    `root` that a job reads; `data` is the fingerprint that the images must have on every node."""

    def __init__(
        self,
        cluster: RayCluster,
        module: str,
        root: Path,
        data: str | None,
        reads: Reads,
        at_once: int | None,
    ) -> None:
        self._cluster, self._root, self._reads, self._at_once = cluster, root, reads, at_once
        self._request = {
            "jobs": module,
            "run": root.resolve().name,
            "root": str(root),
            "from": str(Path.cwd()),
            "threads": cluster.settings.cpus,
            "data": data,
        }

    def map(self, label: str, jobs: Sequence[Json], steps_each: int) -> list[Json]:
        tasks = [self._task(index, job) for index, job in enumerate(jobs)]
        return self._cluster.do(label, tasks, steps_each, self._root, self._at_once)

    def _task(self, index: int, job: Json) -> _Task:
        def files() -> dict[str, bytes]:
            there = [path for path in self._reads(job) if path.is_file()]
            return {path.relative_to(self._root).as_posix(): path.read_bytes() for path in there}

        settings, device = self._cluster.settings, job.get("device")
        needs = {"CPU": float(settings.cpus), "GPU": settings.gpus, **settings.resources}
        needs["GPU"] = max(needs["GPU"], job.get("gpus", 0))
        needs |= {} if device is None else {label(device): 1.0}
        name = " ".join(str(job[key]) for key in ("do", "tier") if key in job)
        return _Task(index, name, _do_job, {**self._request, "job": job}, files, needs)

    def __enter__(self) -> RayTasks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class RayStopwatch:
    """Times files on a node that carries the device's label: `pipeline.costs.table.Measure`."""

    def __init__(self, cluster: RayCluster, profile: DeviceProfile) -> None:
        self._cluster, self._profile = cluster, profile

    def __call__(
        self,
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
        """One record per model, in order. Raises what measuring raises, ConfigError where no node may."""
        if not models:
            return []
        files = {f"{number}.onnx": path for number, path in enumerate(models)}
        request = {
            "models": list(files),
            "reference": None if reference is None else "reference.onnx",
            "settings": settings.to_json(),
            "rounds": rounds,
            "seed": seed,
            "reference_nominal_ms": reference_nominal_ms,
            "max_spread": max_spread,
        }
        if reference is not None:
            files["reference.onnx"] = reference
        name, needs = f"measure on {self._profile.name}", self._cluster.needs_device(self._profile)
        task = _Task(
            0, name, _time, request, lambda: {name: path.read_bytes() for name, path in files.items()}, needs
        )
        steps = len(models) * (rounds + 1)
        return [
            LatencyRecord(**record) for record in self._cluster.do("measure", [task], steps)[0]["records"]
        ]


def _has(resources: Mapping[str, float], needs: Mapping[str, float]) -> bool:
    return all(resources.get(name, 0) >= amount for name, amount in needs.items())


def _advice(task: str, needs: Mapping[str, float], nodes: Sequence[Json], address: str) -> str:
    devices = [name for name in needs if name.startswith(label(""))]
    if devices and not any(_has(node["Resources"], dict.fromkeys(devices, 1.0)) for node in nodes):
        return (
            f"{task}: no node of the cluster carries {devices[0]}; on the machine that is the device, run "
            f"`ray start --address={address} --resources='{{\"{devices[0]}\": 1}}'`"
        )
    there = "; ".join(f"{node['NodeName']}: {_amounts(_told(node['Resources']))}" for node in nodes)
    return (
        f"{task}: no node of the cluster has {_amounts(needs)}; there are: {there}; ask for less with "
        "--task-resources, or start such a node"
    )


def _told(resources: Mapping[str, float]) -> dict[str, float]:
    """Without memory, which tasks do not ask for, and Ray's own marks of nodes."""
    return {k: v for k, v in resources.items() if "memory" not in k and not k.startswith("node:")}


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in sorted(resources.items()))


def _with_node(error: BudgetlineError, node: str) -> BudgetlineError:
    advice = "; every node reads the images itself: they must be there too" * isinstance(error, DataError)
    return type(error)(f"node {node}: {error}{advice}")


def _first_line(failure: BaseException) -> str:
    return next(iter(str(failure).strip().splitlines()), type(failure).__name__)


# --------------------------------------------------------------------------------------------------- the node


def _work(do: Do, request: Json, files: dict[str, bytes]) -> Iterator[Json]:
    """A task: does the work in a thread beside this one, which sends on what it says and saves.

    Messages have one of `node`, `say`, `steps` (with `note`), `file` (with `content`, None where it is gone),
    `error` (with `text`), and last `answer`."""
    yield {"node": importlib.import_module("ray").get_runtime_context().get_node_id()}
    with tempfile.TemporaryDirectory(prefix="budgetline-", ignore_cleanup_errors=True) as parent:
        folder = _Folder(Path(parent, request.get("run", "files")), files)
        messages: queue.SimpleQueue[Json] = queue.SimpleQueue()

        def work() -> None:
            try:
                messages.put(outcome(lambda: _checked(do, folder.root, request, Messages(messages.put))))
            except BaseException as bug:
                messages.put({"bug": bug})

        threading.Thread(target=work, daemon=True).start()
        while True:
            with contextlib.suppress(queue.Empty):
                message = messages.get(timeout=LOOK_SECONDS)
                if "bug" in message:
                    raise message["bug"]
                if "answer" in message:
                    yield from folder.changes()
                elif "error" in message:
                    yield from folder.checkpoints()
                    message["text"] = message["text"].replace(str(folder.root), request.get("root", ""))
                yield message
                if message.keys() & {"answer", "error"}:
                    return
            yield from folder.checkpoints()


def _checked(do: Do, root: Path, request: Json, progress: Progress) -> Json:
    if request["version"] != __version__:
        raise ConfigError(
            f"has budgetline {__version__}, the driver {request['version']}; install the same on every node"
        )
    return do(root, request, progress)


class _Folder:
    """Files as they came, and which of them have changed since."""

    def __init__(self, root: Path, files: Mapping[str, bytes]) -> None:
        self.root = root
        for name, content in files.items():
            path = inside(root, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        self._known = {path: _mark(path) for path in map(root.joinpath, files)}

    def changes(self) -> Iterator[Json]:
        """What was written, records last, then what was removed."""
        files = [path for path in self.root.rglob("*") if path.is_file() and not path.name.startswith(".")]
        yield from self._changed(sorted(files, key=lambda path: path.suffix == ".json"))
        for path in [path for path in self._known if not path.exists()]:
            del self._known[path]
            yield {"file": self._name(path), "content": None}

    def checkpoints(self) -> Iterator[Json]:
        """The arrays that were saved: they are written whole or not at all, so any moment is good."""
        yield from self._changed(path for path in self.root.rglob("*.npz") if not path.name.startswith("."))

    def _changed(self, paths: Iterable[Path]) -> Iterator[Json]:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):  # removed by now
                mark = _mark(path)
                if self._known.get(path) != mark:
                    content = path.read_bytes()
                    self._known[path] = mark
                    yield {"file": self._name(path), "content": content}

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def _mark(path: Path) -> tuple[int, int]:
    """Another one after every atomic write."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def _do_job(root: Path, request: Json, progress: Progress) -> Json:
    """A job of a run, on the images of this node; a relative path to them starts where the driver does."""
    import torch

    torch.set_num_threads(request["threads"])
    if os.path.isdir(request["from"]):
        os.chdir(request["from"])
    jobs: dict[str, Callable[[Run, Json], Json]] = importlib.import_module(request["jobs"]).JOBS
    run = open_run(root, None, progress)
    prepare_compute(run)
    if request["data"] not in (None, run.task.fingerprint):
        raise DataError(
            f"{run.task.name}: the images here have fingerprint {run.task.fingerprint[:12]}, the driver's "
            f"{request['data'][:12]}"
        )
    run.require_same_space()
    return jobs[request["job"]["do"]](run, request["job"])


def _time(root: Path, request: Json, progress: Progress) -> Json:
    _be_as_nice_as_others(progress)
    reference = request["reference"]
    records = measure(
        [root / name for name in request["models"]],
        None if reference is None else root / reference,
        RuntimeSettings.from_json(request["settings"]),
        rounds=request["rounds"],
        seed=request["seed"],
        reference_nominal_ms=request["reference_nominal_ms"],
        max_spread=request["max_spread"],
        progress=progress,
    )
    return {"records": [asdict(record) for record in records]}


def _be_as_nice_as_others(progress: Progress) -> None:
    """Ray starts its processes at niceness 15: on a device anything else would come first."""
    if not hasattr(os, "nice") or os.nice(0) == 0:
        return
    try:
        os.nice(-os.nice(0))
    except PermissionError:
        progress.say(
            f"files are timed at niceness {os.nice(0)}: start the device's node with RAY_worker_niceness=0"
        )


def _look(root: Path, request: Json, progress: Progress) -> Json:
    return timing_environment()
