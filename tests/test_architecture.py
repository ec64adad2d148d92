"""The plan of the house, held by reading the source: who may import whom, and what nobody may do.

Imports inside functions and under TYPE_CHECKING count like any other: a type is a dependency too.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from pipeline.flow import STAGES

PACKAGE = Path(__file__).parents[1] / "pipeline"

ORDER = (
    "types errors settings progress artifacts ranks units algorithms devices data spaces deploy costs "
    "evaluators search derive train report config engine run engine_worker engine_ray stages flow ui cli "
    "launch"
).split()
"""From the ground up: a room imports only itself and what stands before it."""

HELD_OUT_READERS = {"pipeline/train/assess.py", "pipeline/stages/export.py"}
TEST_ASSESSMENTS = (
    "pipeline.train.assess.assess pipeline.train.assess.withstand pipeline.stages.export.accuracy_on_test"
).split()
"""What answers how well a network does on the test split."""

HEAVY = tuple("torch torchvision matplotlib sklearn onnx onnxruntime scipy PIL fvcore ray".split())
LIGHT = (
    "pipeline.ranks pipeline.algorithms pipeline.devices pipeline.devices.profile pipeline.data "
    "pipeline.spaces pipeline.deploy pipeline.costs pipeline.evaluators pipeline.search pipeline.train "
    "pipeline.report pipeline.derive pipeline.config pipeline.run pipeline.engine_ray pipeline.flow "
    "pipeline.cli pipeline.launch"
).split()
"""What the command line and every catalogue load before there is any work."""


class Import(NamedTuple):
    file: str
    line: int
    module: str

    @property
    def importer(self) -> str:
        return self.file.split("/")[1].removesuffix(".py")

    @property
    def imported(self) -> str:
        return self.module.split(".")[1]


@functools.cache
def sources() -> tuple[tuple[str, ast.Module], ...]:
    return tuple(
        (path.relative_to(PACKAGE.parent).as_posix(), ast.parse(path.read_text(encoding="utf-8")))
        for path in sorted(PACKAGE.rglob("*.py"))
    )


def imports() -> Iterator[Import]:
    """Every import of the package in the package; `from pipeline import x` is one of `pipeline.x`."""
    for file, tree in sources():
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
                assert "pipeline" not in names, f"{file}:{node.lineno} imports the whole package"
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}:{node.lineno} imports by a relative path"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                if name.split(".")[0] == "pipeline":
                    yield Import(file, getattr(node, "lineno", 0), name)


def test_every_room_has_its_place_in_the_order() -> None:
    rooms = {
        path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert rooms - {"__init__", "__main__", "__pycache__"} == set(ORDER)


def test_rooms_import_only_what_stands_before_them() -> None:
    place = {room: index for index, room in enumerate(ORDER)}
    wrong = [
        f"{found.file}:{found.line} imports {found.module}"
        for found in imports()
        if found.importer in place
        and found.imported != "__version__"
        and place[found.imported] > place[found.importer]
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_final_assessment_reads_the_test_split() -> None:
    readers = {found.file for found in imports() if found.module.startswith("pipeline.data.held_out")}
    assert readers == HELD_OUT_READERS
    askers = {found.file for found in imports() if found.module in TEST_ASSESSMENTS}
    assert askers == {"pipeline/stages/export.py"}
    homes = {function.rpartition(".")[0] for function in TEST_ASSESSMENTS}
    assert not {found.file for found in imports() if found.module in homes}, "imports all that is in there"


def test_only_a_run_is_handed_a_whole_configuration() -> None:
    takers = {found.file for found in imports() if found.imported == "config"}
    assert takers == {"pipeline/run.py", "pipeline/cli/wanted.py", "pipeline/cli/make.py"}


def test_every_stage_has_a_module_and_imports_no_other_stage() -> None:
    """One reads what another made from the run's folder alone; what they share imports none of them."""
    stages = {f"pipeline.stages.{name}" for name in STAGES}
    assert {stage.__module__ for stage in STAGES.values()} == stages
    wrong = [
        f"{found.file}:{found.line} imports {found.module}"
        for found in imports()
        if found.importer == "stages" and any(f"{found.module}.".startswith(f"{stage}.") for stage in stages)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", LIGHT)
def test_the_light_modules_stay_light(module: str, loaded_by: dict[str, list[str]]) -> None:
    assert loaded_by[module] == []


@pytest.fixture(scope="module")
def loaded_by() -> dict[str, list[str]]:
    """Module → the heavy ones that are there after its import, one after the other in a fresh process."""
    script = (
        "import importlib, sys\n"
        f"for name in {LIGHT!r}:\n"
        "    importlib.import_module(name)\n"
        f"    print(name, *[heavy for heavy in {HEAVY!r} if heavy in sys.modules])\n"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name: heavy for name, *heavy in (line.split() for line in output.stdout.splitlines())}


def calls() -> Iterator[tuple[str, ast.Call]]:
    for file, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield f"{file}:{node.lineno} {ast.unparse(node)}", node


def test_nothing_is_unpickled() -> None:
    banned = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"}
    for file, tree in sources():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not banned & {name.split(".")[0] for name in names}, file
    for where, call in calls():
        name = ast.unparse(call.func)
        assert name not in ("torch.load", "torch.jit.load", "torch.hub.load"), where
        options = {option.arg: ast.unparse(option.value) for option in call.keywords}
        assert options.get("allow_pickle", "False") == "False", where
        if name in ("np.load", "numpy.load"):
            assert options.get("allow_pickle") == "False", f"{where}: say allow_pickle=False"


def test_yaml_is_loaded_safely() -> None:
    """`yaml.safe_load`, or `yaml.load` with the strict loader, which is a SafeLoader."""
    from yaml import SafeLoader

    from pipeline.devices import profile

    assert issubclass(profile._StrictLoader, SafeLoader)
    for where, call in calls():
        name = ast.unparse(call.func)
        if name.startswith("yaml.") and "load" in name and name != "yaml.safe_load":
            options = {option.arg: ast.unparse(option.value) for option in call.keywords}
            assert name == "yaml.load" and options.get("Loader") == "_StrictLoader", where


def test_no_text_is_run_as_code() -> None:
    for where, call in calls():
        assert ast.unparse(call.func) not in ("eval", "exec", "os.system", "os.popen"), where
        assert not any(option.arg == "shell" for option in call.keywords), where
