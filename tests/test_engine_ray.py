"""Ray tasks: the local engine's bits and errors, from nodes that do not see the run and may be lost."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from test_engine import Watched
from tiny_run import DEVICE, TIERS, TINY, Cli

from pipeline import engine_ray
from pipeline.artifacts import read_json, write_yaml
from pipeline.config import parse
from pipeline.devices.environment import probe_model, timing_environment
from pipeline.devices.profile import DeviceProfile
from pipeline.engine import Engine
from pipeline.engine_ray import RayCluster, RaySettings, parse_ray_settings
from pipeline.errors import (
    BudgetlineError,
    ConfigError,
    DataError,
    DivergedTraining,
    MeasurementError,
    ProfileError,
    StorageError,
    WorkerLost,
)
from pipeline.progress import Silent
from pipeline.run import open_run
from pipeline.stages.derive import derive_stage
from pipeline.stages.export import export_stage
from pipeline.stages.retrain import retrain_stage
from pipeline.types import Json

TESTS = Path(__file__).parent
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install '.[ray]'"
)
on_a_cluster = [
    needs_ray,
    # Ray leaves what its processes wrote to, and their exit codes, to the garbage collector
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]


class Nodes:
    """A cluster on this machine: `desk`, where the driver is and which is the device `here`, and `other`."""

    def __init__(self, ray: Any) -> None:
        from ray.cluster_utils import Cluster

        self.ray = ray
        each: Json = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
        desk = {"node_name": "desk", "resources": {"device:here": 1}, "no_monitor": True}
        desk |= {"include_dashboard": False, "include_log_monitor": False}
        self._cluster = Cluster(initialize_head=True, head_node_args={**each, **desk})
        self._session = self._cluster.head_node.get_session_dir_path()
        self._other = self._cluster.add_node(**each, node_name="other")
        ray.init(self._cluster.address, log_to_driver=False, logging_level="error")

    def lose_other(self) -> None:
        self._cluster.remove_node(self._other, allow_graceful=False)

    def stop(self) -> None:
        self.ray.shutdown()
        self._cluster.shutdown()
        shutil.rmtree(self._session)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent)]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("RAY_worker_niceness", "0")  # else whatever runs beside the tests comes first
        patch.delenv("RAY_ADDRESS", raising=False)
        import ray

        cluster = Nodes(ray)
        try:
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run's folder with nothing in it yet."""
    write_yaml(tmp_path / "run" / "run.yaml", {"budgetline": "0", **parse(TINY, "test").to_json()})
    return tmp_path / "run"


class Watching(Watched):
    """A Progress that also calls somebody, with every line and every note."""

    def __init__(self, call: Callable[[str], None]) -> None:
        super().__init__()
        self._call = call

    @contextmanager
    def track(self, label: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        with super().track(label, total, done) as advance:

            def advance_and_call(steps: int, note: str) -> None:
                advance(steps, note)
                self._call(note)

            yield advance_and_call

    def say(self, message: str) -> None:
        super().say(message)
        self._call(message)


def connection(nodes: Nodes, progress: Watched, **settings: Any) -> RayCluster:
    return RayCluster(nodes.ray, RaySettings(**settings), progress)


def device(name: str, threads: int | None) -> DeviceProfile:
    tier = {"name": "s", "limits": {"latency": "1 ms"}}
    return DeviceProfile.model_validate({"name": name, "threads": threads, "tiers": [tier]})


def engine(nodes: Nodes, root: Path, progress: Watched, data: str | None = None) -> Engine:
    def reads(job: Json) -> list[Path]:
        return [root / "run.yaml", root / "linger.npz"]

    return connection(nodes, progress).engine("engine_jobs", root, data, reads, None)


# ---------------------------------------------------------------------------------------------- on a cluster


class TestOnACluster:
    pytestmark = on_a_cluster

    def test_answers_come_in_order_from_several_nodes(self, nodes: Nodes, root: Path) -> None:
        progress = Watched()
        with engine(nodes, root, progress) as tasks:
            answers = tasks.map("squares", [{"do": "square", "x": x} for x in range(4)], steps_each=3)
        assert [answer["x"] for answer in answers] == [x**2 for x in range(4)]
        assert len({answer["process"] for answer in answers} - {os.getpid()}) >= 2
        assert progress.steps == progress.total == 12
        assert {"square on node desk", "square on node other"} <= set(progress.said)
        assert {"squared 3 (node desk)", "squared 3 (node other)"} & set(progress.said)

    @pytest.mark.parametrize(
        ("job", "error", "text"),
        [
            ("diverge", DivergedTraining, "^node (desk|other): run: the loss is nan$"),
            (
                "die",
                WorkerLost,
                "^die: lost on node (desk|other) .*, 1 times in all: .*run the same",
            ),
            ("fill_the_disk", StorageError, "^node (desk|other): weights.npz: No space left on device$"),
        ],
    )
    def test_errors_are_told_as_they_were_raised(
        self,
        nodes: Nodes,
        root: Path,
        monkeypatch: pytest.MonkeyPatch,
        job: str,
        error: type[BudgetlineError],
        text: str,
    ) -> None:
        monkeypatch.setattr(engine_ray, "MOST_LOSSES", 0)
        with engine(nodes, root, Watched()) as tasks, pytest.raises(error, match=text):
            tasks.map("", [{"do": job}], steps_each=1)

    def test_a_node_with_other_images_is_refused(self, nodes: Nodes, root: Path) -> None:
        with (
            engine(nodes, root, Watched(), data="0" * 64) as tasks,
            pytest.raises(
                DataError, match="node (desk|other): digits: .*, the driver's 000000000000; every node reads"
            ),
        ):
            tasks.map("", [{"do": "square", "x": 1}], steps_each=1)

    def test_a_job_whose_process_is_lost_goes_on_from_the_checkpoint_that_came_back(
        self, nodes: Nodes, root: Path
    ) -> None:
        killed: list[int] = []

        def kill_once(note: str) -> None:
            if not killed and (root / "linger.npz").exists():
                killed.append(int(note.removeprefix("linger: ")))
                os.kill(killed[0], signal.SIGKILL)

        progress = Watching(kill_once)
        with engine(nodes, root, progress) as tasks:
            answers = tasks.map("linger", [{"do": "linger"}], steps_each=100)
        assert killed and answers == [{"went_on_from": 7, "weights": [0, 1, 2]}]
        assert progress.steps == 100, "what the lost one had done is taken back"
        assert any(line.startswith("linger: lost on node ") for line in progress.said)
        assert not (root / "linger.npz").exists()

    def test_files_are_timed_where_the_label_is(self, nodes: Nodes, tmp_path: Path) -> None:
        model = tmp_path / "probe.onnx"
        model.write_bytes(probe_model())
        here = device("here", 1)
        progress = Watched()
        found = connection(nodes, progress)
        time_files = found.stopwatch(here)
        for attempts_left in reversed(range(8)):
            try:
                [record] = time_files([model], model, here.runtime(), rounds=1, seed=0, max_spread=1e9)
                break
            except MeasurementError:  # few rounds, of which a disturbed machine may leave none
                if not attempts_left:
                    raise
        assert record.latency_ms > 0 and progress.total == 2
        assert found.environment(here) == timing_environment()
        assert found.needs_device(here)["device:here"] == 1, "all of it: one at a time"
        assert found.needs_device(here.model_copy(update={"threads": None})), "the driver's own cores"

    def test_without_the_label_it_is_said_what_to_start(self, nodes: Nodes, tmp_path: Path) -> None:
        pi = device("pi", 1)
        with pytest.raises(ConfigError, match=r"no node .* device:pi; .*--resources='\{\"device:pi\": 1\}'"):
            connection(nodes, Watched()).stopwatch(pi)([tmp_path], None, pi.runtime(), rounds=1, seed=0)

    def test_a_device_on_another_node_must_say_its_threads(
        self, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = connection(nodes, Watched())
        monkeypatch.setattr(RayCluster, "_carriers", lambda self, profile: {"another node"})
        with pytest.raises(ProfileError, match="'threads' is not stated"):
            found.environment(device("here", None))

    def test_what_no_node_has_is_refused(self, nodes: Nodes, root: Path) -> None:
        tasks = connection(nodes, Watched(), cpus=64).engine("engine_jobs", root, None, lambda job: [], None)
        with pytest.raises(
            ConfigError, match=r"no node of the cluster has CPU 64; .*desk: CPU 1, device:here 1"
        ):
            tasks.map("", [{"do": "square", "x": 1}], steps_each=1)

    def test_the_command_line_reaches_the_cluster(self, nodes: Nodes, cli: Cli, copied: Path) -> None:
        records = [copied / DEVICE / tier / "export.json" for tier in TIERS]
        before = [exported_files(record) for record in records]
        for record in records:
            record.unlink()
        outcome = cli("export", "--engine", "ray", "--task-resources", "cpus=1", "--out", copied)
        assert outcome.code == 0, outcome
        assert f"export {DEVICE}/s on node " in outcome.err
        assert [exported_files(record) for record in records] == before

    def test_a_family_is_the_local_engines_though_a_node_is_lost_while_it_retrains(
        self, nodes: Nodes, copied: Path, tmp_path: Path
    ) -> None:
        for path in [*copied.glob("search/trials/*"), *copied.glob(f"{DEVICE}/*/*")]:
            path.unlink()
        local = Path(shutil.copytree(copied, tmp_path / "local" / copied.name))
        lost: list[str] = []

        def lose_the_other(line: str) -> None:
            if line.startswith("retrain") and line.endswith("on node other") and not lost:
                lost.append(line.removesuffix(" on node other"))
                nodes.lose_other()

        progress = Watching(lose_the_other)
        run = open_run(copied, None, progress)
        run.cluster = connection(nodes, progress)
        alone = open_run(local, None, Silent())
        alone.workers = 1  # in this process, on one thread as on the nodes
        with one_thread():
            for stage in (derive_stage, retrain_stage, export_stage):
                stage(run)
                stage(alone)
        assert f"{lost[0]} on node desk" in progress.said
        assert made_by(copied) == made_by(local)


def made_by(root: Path) -> Json:
    """All that a family is, without what says how long it took."""
    return {
        path.relative_to(root).as_posix(): without_times(read_json(path))
        if path.suffix == ".json"
        else path.read_bytes()
        for path in [*root.glob("search/trials/*"), *root.glob(f"{DEVICE}/*/*")]
        if path.name != "measure.json"
    }


def exported_files(record: Path) -> list[str]:
    """The sha256 of what an export wrote; the rest tells in its last digits how many threads there were."""
    return [file["export"]["sha256"] for file in read_json(record)["files"].values()]


def without_times(record: Any) -> Any:
    if isinstance(record, list):
        return [without_times(item) for item in record]
    if isinstance(record, dict):
        times = {"seconds", "trained_seconds", "images_per_second"}
        return {key: without_times(value) for key, value in record.items() if key not in times}
    return record


# -------------------------------------------------------------------------------------------- in this process


class FakeRay(ModuleType):
    """As much of Ray as the driver uses, in this process: nodes of one CPU that take turns, and tasks that
    are lost after so many messages as `losses` says, one after the other."""

    def __init__(self, *names: str, losses: Sequence[int] = ()) -> None:
        super().__init__("ray")
        self.names, self.started = itertools.cycle(names), list[Json]()
        self.cancelled = 0
        self._losses, self._here = list(losses), ""
        self._nodes = [
            {"NodeID": f"id of {name}", "NodeName": name, "Alive": True, "Resources": {"CPU": 1.0}}
            for name in names
        ]
        kinds = "NodeDiedError WorkerCrashedError OutOfMemoryError ObjectLostError RayTaskError".split()
        base = type("RayError", (Exception,), {})
        self.exceptions = SimpleNamespace(RayError=base, **{kind: type(kind, (base,), {}) for kind in kinds})

    def nodes(self) -> list[Json]:
        return self._nodes

    def get_runtime_context(self) -> SimpleNamespace:
        return SimpleNamespace(get_node_id=lambda: f"id of {self._here}", gcs_address="desk:6379")

    def remote(self, function: Callable[..., Iterator[Json]]) -> SimpleNamespace:
        def options(**wanted: Any) -> SimpleNamespace:
            def start(*arguments: Any) -> Iterator[Json]:
                self.started.append(wanted)
                lost_after = self._losses.pop(0) if self._losses else None
                return self._stream(function(*arguments), next(self.names), lost_after)

            return SimpleNamespace(remote=start)

        return SimpleNamespace(options=options)

    def _stream(self, task: Iterator[Json], node: str, lost_after: int | None) -> Iterator[Json]:
        for count in itertools.count():
            if count == lost_after:
                task.close()  # type: ignore[attr-defined]
                raise self.exceptions.NodeDiedError("the node is gone\nand more")
            self._here = node
            try:
                yield next(task)
            except StopIteration:
                return

    def wait(self, streams: list[Any], *, num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        return streams[:1], streams[1:]

    def get(self, message: Json) -> Json:
        return message

    def cancel(self, stream: Any, *, force: bool) -> None:
        self.cancelled += 1


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeRay]:
    """A fake cluster, which is what tasks then import as `ray`."""

    def make(*names: str, losses: Sequence[int] = ()) -> FakeRay:
        fake = FakeRay(*names, losses=losses)
        monkeypatch.setitem(sys.modules, "ray", fake)
        return fake

    return make


Make = Callable[..., FakeRay]


def squares(ray: FakeRay, root: Path, progress: Watched, number: int, do: str = "square") -> list[Json]:
    tasks = RayCluster(ray, RaySettings(), progress).engine(
        "engine_jobs", root, None, lambda job: [root / "run.yaml"], 2
    )
    with tasks:
        return tasks.map("squares", [{"do": do, "x": x} for x in range(number)], steps_each=3)


def test_a_lost_task_is_done_again_and_its_steps_are_taken_back(root: Path, in_process: Make) -> None:
    ray, progress = in_process("a", "b", losses=[2, 1]), Watched()
    assert [answer["x"] for answer in squares(ray, root, progress, 3)] == [0, 1, 4]
    assert len(ray.started) == 5 and ray.cancelled == 0
    assert progress.steps == progress.total == 9
    again = "square: lost on node a (NodeDiedError); it starts again from the last checkpoint that came back"
    assert again in progress.said


def test_a_task_that_is_always_lost_ends_the_job(root: Path, in_process: Make) -> None:
    ray = in_process("a", losses=[1] * 9)
    with pytest.raises(WorkerLost, match="^square: lost on node a .*, 4 times in all: the node is gone; fin"):
        squares(ray, root, Watched(), 1)
    assert len(ray.started) == 1 + engine_ray.MOST_LOSSES


def test_the_first_error_ends_the_others(root: Path, in_process: Make) -> None:
    ray = in_process("a")
    with pytest.raises(DivergedTraining, match="^node a: run: the loss is nan$"):
        squares(ray, root, Watched(), 3, do="diverge")
    assert len(ray.started) == 2, "at most two at a time"
    assert ray.cancelled == 1, "the one that told the error has ended"


def test_a_task_asks_for_what_the_job_needs(root: Path, in_process: Make) -> None:
    ray = in_process("a")
    ray.nodes()[0]["Resources"] |= {"CPU": 4.0, "GPU": 1.0, "device:pi": 1.0, "big": 1.0}
    settings = RaySettings(cpus=3, resources={"big": 0.5})
    tasks = RayCluster(ray, settings, Watched()).engine("engine_jobs", root, None, lambda job: [], None)
    with pytest.raises(BudgetlineError):  # no run.yaml came with it
        tasks.map("", [{"do": "square", "x": 1, "device": "pi", "gpus": 1}], steps_each=1)
    [asked] = ray.started
    assert (asked["num_cpus"], asked["num_gpus"]) == (3, 1)
    assert asked["resources"] == {"big": 0.5, "device:pi": 1}
    assert asked["max_retries"] == 0, "it would want the same stream again"


@pytest.mark.parametrize("recipe", [{}, {"start": "supernet", "distil": {"weight": 0.5}}])
def test_jobs_tell_all_that_they_read(copied: Path, in_process: Make, recipe: Json) -> None:
    """Every job in a folder that holds nothing else makes what it makes in the run's own."""
    config = {**TINY, "retrain": {**TINY["retrain"], **recipe}}
    write_yaml(copied / "run.yaml", {"budgetline": "0", **parse(config, "test").to_json()})
    made = []
    for ray in (None, in_process("a", "b")):
        for name in ("train", "weights", "export", "samples", "model"):
            for path in copied.glob(f"{DEVICE}/*/{name}*"):
                path.unlink()
        run = open_run(copied, None, Silent())
        run.workers = 1
        run.cluster = None if ray is None else RayCluster(ray, RaySettings(), Silent())
        with one_thread():
            retrain_stage(run)
            export_stage(run)
        made.append(made_by(copied))
    assert made[0] == made[1]


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------------ parts


def test_a_tasks_folder_tells_what_changed_records_last(tmp_path: Path) -> None:
    files = {"run.yaml": b"1", "s/training.npz": b"old", "s/arch.json": b"{}"}
    folder = engine_ray._Folder(tmp_path / "run", files)
    assert list(folder.changes()) == []
    (folder.root / "s" / "new.npz").write_bytes(b"saved")
    (folder.root / "s" / ".draft.npz").write_bytes(b"half")
    (folder.root / "s" / "train.json").write_bytes(b"done")
    assert list(folder.checkpoints()) == [{"file": "s/new.npz", "content": b"saved"}]
    (folder.root / "s" / "weights.safetensors").write_bytes(b"trained")
    (folder.root / "s" / "training.npz").unlink()
    assert list(folder.changes()) == [
        {"file": "s/weights.safetensors", "content": b"trained"},
        {"file": "s/train.json", "content": b"done"},
        {"file": "s/training.npz", "content": None},
    ]


def test_a_node_with_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the driver 0.0.0; install the same"):
        engine_ray._checked(engine_ray._look, tmp_path, {"version": "0.0.0"}, Silent())


def test_without_ray_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(ConfigError, match=r"pip install '\.\[ray\]'"),
        engine_ray.connected(RaySettings(), [], Silent()),
    ):
        pass


def test_the_flags_say_what_a_task_asks_for() -> None:
    assert parse_ray_settings(None, None, "cpu") == RaySettings()
    assert parse_ray_settings("auto", None, "cuda") == RaySettings(address="auto", gpus=1)
    found = parse_ray_settings(None, "cpus=4, big=0.5", "cpu")
    assert (found.cpus, found.gpus, found.resources) == (4, 0, {"big": 0.5})


@pytest.mark.parametrize(
    ("address", "resources", "device", "text"),
    [
        (None, "cpus", "cpu", "expected NAME=AMOUNT, as in cpus=2,gpus=1, got 'cpus'"),
        (None, "cpus=many", "cpu", "'cpus' is 'many'"),
        (None, "cpus=0", "cpu", "'cpus' is '0'"),
        (None, None, "cuda:1", "say --device cuda"),
        ("ray://head:10001", None, "cpu", "start this command on a node of the cluster"),
    ],
)
def test_flags_that_cannot_be_are_refused(
    address: str | None, resources: str | None, device: str, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        parse_ray_settings(address, resources, device)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--engine", "dask"), "--engine dask: there are local and ray"),
        (("--ray-address", "auto"), "--ray-address is for a cluster: say --engine ray"),
        (("--task-resources", "cpus=2"), "--task-resources is for a cluster"),
    ],
)
def test_the_command_line_refuses(cli: Cli, copied: Path, flags: tuple[str, str], text: str) -> None:
    outcome = cli("retrain", *flags, "--out", copied)
    assert outcome.code == 2 and f"ConfigError: {text}" in outcome.err
