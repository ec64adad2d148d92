"""Bad input and faults at the command line: a line or two that say what to do, exit 2, and nothing lost."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny_run import DEVICE, TIERS, TINY, Cli, Outcome

from pipeline import artifacts, flow
from pipeline.artifacts import RunFolder, sha256_file
from pipeline.run import TraceFile
from pipeline.stages import search


def refused(outcome: Outcome, kind: str, *needles: str) -> str:
    """The complaint, of one or two lines."""
    assert outcome.code == 2 and outcome.crash is None, outcome
    assert "Traceback" not in outcome.err
    lines = outcome.err.splitlines()
    [start] = [number for number, line in enumerate(lines) if line.startswith(f"{kind}: ")]
    assert len(lines) - start <= 2
    message = "\n".join(lines[start:])
    for needle in needles:
        assert needle in message
    return message


def describe(folder: Path, **sections: Any) -> Path:
    path = folder / "described.yaml"
    path.write_text(yaml.safe_dump({**TINY, **sections}))
    return path


def profile(*limits: dict[str, object], **changed: object) -> list[dict[str, object]]:
    tiers = [{"name": f"t{number}", "limits": limit} for number, limit in enumerate(limits)]
    return [{"name": "mine", "provider": "none", "tiers": tiers, **changed}]


# ------------------------------------------------------------------------------------------ what is asked for


@pytest.mark.parametrize(
    ("sections", "kind", "needles"),
    [
        ({"sed": 1}, "ConfigError", ["described.yaml: unknown key 'sed'"]),
        ({"search": {"evaluation": 9}}, "ConfigError", ["unknown key 'evaluation'", "'evaluations'"]),
        ({"method": "gradient"}, "ConfigError", ["unknown method 'gradient'; there are: asng"]),
        ({"space": "resnet"}, "ConfigError", ["unknown space 'resnet'; there are: "]),
        ({"evaluator": "oracle"}, "ConfigError", ["unknown evaluator 'oracle'"]),
        ({"data": "mnist"}, "ConfigError", ["unknown data set 'mnist'"]),
        (
            {"profiles": profile({"joules": "1 J"})},
            "ProfileError",
            ["tiers[0] ('t0')", "unknown metric 'joules'"],
        ),
        ({"profiles": profile({"params": 300})}, "ProfileError", ["'params' is 300: the unit is missing"]),
        ({"profiles": profile({"params": "-3 k"})}, "ProfileError", ["must be a finite number above zero"]),
        ({"profiles": profile({"params": "0 k"})}, "ProfileError", ["must be a finite number above zero"]),
        ({"profiles": profile({})}, "ProfileError", ["has no limits"]),
        ({"profiles": profile()}, "ProfileError", ["'tiers'"]),
        (
            {"profiles": profile({"params": "30 k"}, {"params": "30 k"})},
            "ProfileError",
            ["tiers 't0' and 't1' have the same limits"],
        ),
        ({"profiles": profile({"latency": "1 ms"})}, "ProfileError", ["'latency' but 'provider' is none"]),
        ({"profiles": profile({"params": "9 k"}, provider="gpu")}, "ProfileError", ["unknown provider"]),
        ({"profiles": profile({"params": "9 k"}, threads=4)}, "ProfileError", ["'threads' has no effect"]),
        ({"profiles": ["phone"]}, "ProfileError", ["no profile 'phone': neither a file nor a name"]),
    ],
)
def test_a_run_that_makes_no_sense_is_not_started(
    cli: Cli, tmp_path: Path, sections: dict[str, Any], kind: str, needles: list[str]
) -> None:
    outcome = cli("run", describe(tmp_path, **sections), "--out", tmp_path / "run")
    refused(outcome, kind, *needles)
    assert not (tmp_path / "run" / "run.yaml").exists()


def test_an_unreachable_budget_is_refused_before_the_search_and_may_be_corrected(
    cli: Cli, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    asked = describe(tmp_path, profiles=profile({"params": "0.1 k"}))
    message = refused(cli("run", asked, "--out", root), "InfeasibleBudget", "mine/t0", "0.1 k")
    assert any(unit in message for unit in (" k", " M")), "the nearest reachable value comes with its unit"
    assert not (root / "search").exists()
    corrected = describe(tmp_path, profiles=profile({"params": "50 %"}))
    assert cli("profile", corrected, "--out", root).code == 0


def test_an_option_that_is_no_number_is_the_parser_s_to_refuse(cli: Cli) -> None:
    for words in (["run", "--seed", "one"], ["run", "--seed", "-1"], ["runs"], ["verify"]):
        outcome = cli(*words)
        assert outcome.code == 2 and outcome.crash is None and "Traceback" not in outcome.err


# ----------------------------------------------------------------------------------------------------- images


def write_images(root: Path, sizes: dict[str, list[int]]) -> None:
    """Class folder → one square image per size."""
    rng = np.random.default_rng(0)
    for name, pixels in sizes.items():
        (root / name).mkdir(parents=True)
        for number, size in enumerate(pixels):
            image = Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8))
            image.save(root / name / f"{number}.png")


@pytest.mark.parametrize(
    ("sizes", "needles"),
    [
        ({}, ["wanted at least 2 class folders", "found none"]),
        ({"cat": [8] * 9}, ["wanted at least 2 class folders", "only 'cat'"]),
        ({"cat": [8] * 9, "dog": []}, ["class 'dog' has 0"]),
        ({"cat": [8] * 9, "dog": [8, 8]}, ["wanted at least 3 images per class", "class 'dog' has 2"]),
        ({"cat": [8] * 9, "dog": [8, 8, 16]}, ["2 different sizes", "set data.image_size"]),
    ],
)
def test_images_that_cannot_be_used_are_named(
    cli: Cli, tmp_path: Path, sizes: dict[str, list[int]], needles: list[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    write_images(images, sizes)
    outcome = cli("run", describe(tmp_path, data=f"image-folder:{images}"), "--out", tmp_path / "run")
    refused(outcome, "DataError", str(images), *needles)


def test_a_corrupt_image_is_named(cli: Cli, tmp_path: Path) -> None:
    images = tmp_path / "images"
    write_images(images, {"cat": [8] * 9, "dog": [8] * 9})
    (images / "dog" / "3.png").write_bytes((images / "dog" / "3.png").read_bytes()[:60])
    outcome = cli("run", describe(tmp_path, data=f"image-folder:{images}"), "--out", tmp_path / "run")
    refused(outcome, "DataError", "1 of 18 images cannot be read", "dog/3.png")


def test_images_that_are_not_there(cli: Cli, tmp_path: Path) -> None:
    outcome = cli(
        "run", describe(tmp_path, data=f"image-folder:{tmp_path / 'no'}"), "--out", tmp_path / "run"
    )
    refused(outcome, "DataError", "nothing is there")


@pytest.mark.parametrize(("images", "place"), [(".", "."), ("..", "dog")])
def test_a_run_among_its_own_images_is_refused_before_it_becomes_a_class(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: str, place: str
) -> None:
    write_images(tmp_path, {"cat": [8] * 9, "dog": [8] * 9})
    described = describe(tmp_path, data=f"image-folder:{images}")
    monkeypatch.chdir(tmp_path / place)
    outcome = cli("profile", described)
    refused(
        outcome, "ConfigError", f"exports/described: this folder of the run lies within the images ({images})"
    )
    assert not Path("exports").exists()
    outside = tmp_path.with_name(f"{tmp_path.name}-run")
    assert cli("profile", described, "--out", outside).code == 0


def test_what_the_message_asks_for_helps_in_the_same_folder(cli: Cli, tmp_path: Path) -> None:
    """Mixed sizes: the run is described anew with `image_size`, since nothing was made of it yet."""
    images, root = tmp_path / "images", tmp_path / "run"
    write_images(images, {"cat": [8] * 8 + [16], "dog": [8] * 9})
    words = ["profile", describe(tmp_path, data=f"image-folder:{images}"), "--out", root]
    refused(cli(*words), "DataError", "set data.image_size")
    assert cli(*words, "--set", "data.image_size=8").code == 0
    refused(cli(*words, "--set", "data.image_size=16"), "StaleArtifact", "another data")


def test_a_folder_with_splits_of_its_own_goes_on(cli: Cli, tmp_path: Path) -> None:
    """Such a folder refuses a share for its test split; the defaults in run.yaml must not count as one."""
    images, root = tmp_path / "images", tmp_path / "run"
    write_images(images / "train", {"cat": [8] * 6, "dog": [8] * 6})
    write_images(images / "test", {"cat": [8] * 2, "dog": [8] * 2})
    words = ["profile", describe(tmp_path, data=f"image-folder:{images}"), "--out", root]
    assert [cli(*words).code, cli(*words).code, cli("profile", "--out", root).code] == [0, 0, 0]


# ---------------------------------------------------------------------------------------------------- devices


def test_a_provider_that_is_not_there_is_refused_at_once(cli: Cli, tmp_path: Path) -> None:
    described = describe(tmp_path, profiles=profile({"latency": "1 ms"}, provider="qnn"))
    outcome = cli("run", described, "--out", tmp_path / "run")
    refused(outcome, "ProviderError", "provider QNNExecutionProvider cannot be used", "budgetline doctor")
    assert "calibration" not in outcome.err, "nothing was written for a device that is not there"


def test_there_is_no_falling_back_from_a_gpu_to_the_cpu(cli: Cli, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    described = describe(tmp_path, profiles=profile({"latency": "1 ms"}, provider="cuda"))
    refused(cli("run", described, "--out", tmp_path / "run"), "ProviderError", "CUDAExecutionProvider")
    outcome = cli("run", describe(tmp_path, device="cuda"), "--out", tmp_path / "train")
    refused(outcome, "ConfigError", "device: cuda was asked for", "no GPUs that work", "--device cpu")


# ------------------------------------------------------------------------------------------------ run folders


def test_a_folder_without_a_run_is_left_as_it_is(cli: Cli, tmp_path: Path) -> None:
    for words in (["run"], ["search"], ["report"]):
        refused(cli(*words, "--out", tmp_path / "typo"), "RunFolderError", "holds no run", "budgetline run")
    for words in (["verify"], ["select"]):
        refused(cli(*words, tmp_path / "typo"), "RunFolderError", "typo: no such folder")
    assert not (tmp_path / "typo").exists()


def test_somebody_else_s_run_yaml_is_not_overwritten(cli: Cli, tmp_path: Path) -> None:
    mine = tmp_path / "run.yaml"
    mine.write_text(yaml.safe_dump(TINY))
    outcome = cli("run", mine, "--out", tmp_path)
    refused(outcome, "RunFolderError", "run.yaml: was not written by budgetline")
    assert yaml.safe_load(mine.read_text()) == TINY


def test_a_file_in_the_place_of_the_folder(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    refused(cli("run", describe(tmp_path), "--out", tmp_path / "run"), "StorageError", str(tmp_path / "run"))


def test_a_second_process_on_the_same_run_is_refused(cli: Cli, finished: Path) -> None:
    with RunFolder(finished).locked():
        for words in (["run"], ["retrain", "--tier", "s"]):
            refused(cli(*words, "--out", finished), "RunLocked", "another process works on this run")


def test_a_run_that_another_process_holds_is_refused(cli: Cli, finished: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom pipeline.artifacts import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).locked():\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(finished)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        refused(cli("run", "--out", finished), "RunLocked")
        holder.send_signal(signal.SIGKILL)
    assert cli("retrain", "--out", finished).code == 0, "a lock does not outlive its process"


def test_every_record_cut_short_is_named(cli: Cli, copied: Path) -> None:
    records = [path for path in copied.rglob("*.json") if "trials" not in path.parts]
    records.remove(copied / "manifest.json")  # made anew by every run
    assert len(records) == 2 + 4 * len(TIERS)
    for path in records:
        whole = path.read_bytes()
        damages = (whole[: len(whole) // 2], b"", b"[1, 2]", b'{"schema": 99, "inputs": {}}')
        for content in damages[: 1 if TIERS[1] in path.parts else None]:  # the first tier's tell the rest
            path.write_bytes(content)
            refused(cli("run", "--out", copied), "CorruptArtifact", str(path), "remove")
        path.write_bytes(whole)
    assert cli("run", "--out", copied).code == 0


def test_a_description_cut_short_is_named(cli: Cli, copied: Path) -> None:
    path = copied / "run.yaml"
    whole = path.read_bytes()
    for content in (b"", whole[:10], b"profiles: [", b"\xff\xfe"):
        path.write_bytes(content)
        outcome = cli("run", "--out", copied)
        assert outcome.code == 2 and outcome.crash is None and str(path) in outcome.err


@pytest.mark.parametrize(
    ("damaged", "gone", "stage", "remedy"),
    [
        ("search/evaluator.npz", f"{DEVICE}/s/arch.json", "derive", "search/result.json"),
        (f"{DEVICE}/s/weights.safetensors", f"{DEVICE}/s/export.json", "export", f"{DEVICE}/s/train.json"),
    ],
)
def test_a_damaged_file_says_which_record_to_remove(
    cli: Cli, copied: Path, damaged: str, gone: str, stage: str, remedy: str
) -> None:
    (copied / gone).unlink()
    content = (copied / damaged).read_bytes()
    (copied / damaged).write_bytes(content[: len(content) // 2])
    refused(cli(stage, "--out", copied), "CorruptArtifact", str(copied / damaged), str(copied / remedy))
    (copied / damaged).unlink()
    refused(cli(stage, "--out", copied), "CorruptArtifact", str(copied / damaged), str(copied / remedy))


@pytest.mark.parametrize(
    ("checkpoint", "gone", "stage"),
    [
        ("search/state.npz", "search/result.json", "search"),
        (f"{DEVICE}/s/training.npz", f"{DEVICE}/s/train.json", "retrain"),
    ],
)
def test_a_damaged_checkpoint_may_be_removed(
    cli: Cli, copied: Path, checkpoint: str, gone: str, stage: str
) -> None:
    (copied / gone).unlink()
    (copied / checkpoint).write_bytes(b"PK\x03\x04 and no more")
    refused(cli(stage, "--out", copied), "CorruptArtifact", checkpoint, "remove this file")
    (copied / checkpoint).unlink()
    assert cli(stage, "--out", copied).code == 0


def test_a_manifest_cannot_lead_out_of_its_folder(cli: Cli, copied: Path) -> None:
    path = copied / "manifest.json"
    whole = path.read_text()
    (copied.parent / "secret").write_text("not of this run")
    (copied / "link").symlink_to(copied.parent / "secret")
    for leads_out in ("../secret", "/etc/passwd", "a/../../secret", "..\\secret", "link"):
        manifest = json.loads(whole)
        tier = manifest["tiers"][0]
        old, tier["files"][0]["path"] = tier["files"][0]["path"], leads_out
        tier["answer"] = leads_out if tier["answer"] == old else tier["answer"]
        path.write_text(json.dumps(manifest))
        refused(cli("select", copied), "CorruptArtifact", "manifest.json")
        refused(cli("list", copied), "CorruptArtifact", "manifest.json")
        outcome = cli("verify", copied)
        assert outcome.code == 1 and outcome.crash is None and "FAILED" in outcome.out


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 2}', '{"schema": 1, "tiers": []}'])
def test_a_manifest_that_is_none_is_refused(cli: Cli, copied: Path, content: str) -> None:
    (copied / "manifest.json").write_text(content)
    refused(cli("select", copied, "--params", "1M"), "CorruptArtifact", "manifest.json")
    assert cli("verify", copied).code == 1
    assert cli("run", "--out", copied).code == 0, "it is made anew from the records"


# ------------------------------------------------------------------------------------------------ a full disk


class FullDisk:
    """A disk that takes so many files more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files_left = 0
        self._sync = os.fsync
        monkeypatch.setattr(artifacts.os, "fsync", self)

    def __call__(self, descriptor: int) -> None:
        if self.files_left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.files_left -= 1
        self._sync(descriptor)


def test_a_disk_that_fills_up_costs_nothing_that_was_done(
    cli: Cli, finished: Path, tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, disk = tmp_path / "tiny", FullDisk(monkeypatch)
    for words in (["profile", tiny_yaml], ["search"], ["derive"], ["retrain"]):
        for room in range(20):
            disk.files_left = room
            outcome = cli(*words, "--out", root)
            assert not [path for path in root.rglob(".*") if path.name != ".lock"], "a draft was left behind"
            if outcome.code == 0:
                break
            refused(outcome, "StorageError", str(root), "no space left on the disk")
        assert outcome.code == 0 and room > 0
    for tier in TIERS:
        name = f"{DEVICE}/{tier}/weights.safetensors"
        assert sha256_file(root / name) == sha256_file(finished / name)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_under_the_trace(cli: Cli, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(TraceFile):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.path = Path("/dev/full")

    (copied / "search" / "result.json").unlink()
    monkeypatch.setattr(search, "TraceFile", Full)
    refused(cli("search", "--out", copied), "StorageError", "No space left on device", "same command again")
    monkeypatch.undo()
    assert cli("search", "--out", copied).code == 0


def test_stopping_is_no_fault(cli: Cli, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(flow.STAGES, "retrain", stop)
    outcome = cli("retrain", "--out", copied)
    assert outcome.code == 130 and "the same command goes on from here" in outcome.err


# ----------------------------------------------------------------------------------------- diverging training


def test_a_supernet_that_diverges_says_where_and_says_it_again(cli: Cli, tmp_path: Path) -> None:
    evaluator = {**TINY["evaluator"], "learning_rate": 1e30, "warm_up_steps": 0}
    described = describe(tmp_path, evaluator=evaluator, search={"warm_up": 6, "evaluations": 12})
    words = ["run", described, "--out", tmp_path / "run"]
    first = refused(cli(*words), "DivergedTraining", "at step ", "lower evaluator.learning_rate")
    assert refused(cli(*words), "DivergedTraining") == first
    assert not (tmp_path / "run" / "search" / "result.json").exists()


def test_a_network_that_diverges_says_where_and_keeps_what_was_done(cli: Cli, copied: Path) -> None:
    path = copied / "run.yaml"
    asked = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**asked, "retrain": {"epochs": 2, "lr": 1e30}}))
    (copied / DEVICE / "s" / "train.json").unlink()
    weights = sha256_file(copied / DEVICE / "s" / "weights.safetensors")
    words = ["retrain", "--tier", "s", "--out", copied]
    message = refused(cli(*words), "DivergedTraining", f"retrain {DEVICE}/s", " at step ", "lower the recipe")
    assert refused(cli(*words), "DivergedTraining") == message
    assert sha256_file(copied / DEVICE / "s" / "weights.safetensors") == weights
    assert not (copied / DEVICE / "s" / "train.json").exists()

    path.write_text(yaml.safe_dump(asked))
    assert cli(*words).code == 0
    assert sha256_file(copied / DEVICE / "s" / "weights.safetensors") == weights


# ---------------------------------------------------------------------------------------------------- kill -9

DEADLY = """
import os, signal, sys
from pipeline import artifacts
from pipeline.search.base import _Search
from pipeline.train.retrain import retrain

name, when, moment, *words = sys.argv[1:]
_Search.save_if_due = _Search.save  # checkpoints at every step, not every twenty seconds
retrain.__kwdefaults__["checkpoint_seconds"] = 0.0
save, seen = artifacts.write_arrays, 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def deadly(path, arrays):
    global seen
    seen += path.name == name
    last = path.name == name and seen == int(when)
    if last and moment == "before":
        artifacts.os.fsync = lambda descriptor: die()  # the draft is written, its place not taken
    save(path, arrays)
    if last:
        die()

artifacts.write_arrays = deadly
from pipeline.cli import app
app(words, prog_name="budgetline")
"""


def killed(root: Path, described: Path, name: str, when: int, moment: str) -> None:
    words = [name, str(when), moment, "run", str(described), "--out", str(root)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", DEADLY, *words], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill -9 here")
def test_a_run_killed_in_search_and_in_retraining_ends_with_the_same_bits(
    cli: Cli, finished: Path, tiny_yaml: Path, tmp_path: Path
) -> None:
    root = tmp_path / "tiny"
    killed(root, tiny_yaml, "state.npz", 3, "after")
    assert (root / "search" / "state.npz").exists() and not (root / "search" / "result.json").exists()
    killed(root, tiny_yaml, "training.npz", 2, "before")
    assert (root / DEVICE / "l" / "training.npz").exists()
    for words in (["retrain"], ["export", "--tier", "s"]):
        assert cli(*words, "--out", root).code == 0
    same = [f"{DEVICE}/{tier}/weights.safetensors" for tier in TIERS] + ["search/trace.jsonl"]
    same += [f"{DEVICE}/s/model.onnx", f"{DEVICE}/s/model.batch1.onnx"]
    for name in same:
        assert sha256_file(root / name) == sha256_file(finished / name), name
    unlike = {"seconds": 0, "trained_seconds": 0, "inputs": 0}
    for tier in TIERS:
        arch, expected = (json.loads((r / DEVICE / tier / "arch.json").read_text()) for r in (root, finished))
        assert {**arch, **unlike} == {**expected, **unlike}
