import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline import artifacts
from pipeline.artifacts import FileCheckpoint, RunFolder, inside, read_json, read_yaml, replacing, write_json
from pipeline.errors import CorruptArtifact, RunFolderError, RunLocked, StaleArtifact, StorageError


def test_a_failed_write_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(ValueError, match="torn"), replacing(path) as draft:
        draft.write_text("half")
        raise ValueError("torn")
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_no_space_left_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifacts.os, "fsync", full)
    with pytest.raises(StorageError, match="no space left on the disk"):
        write_json(tmp_path / "a.json", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "{", '{"a": 1'])
def test_half_written_json_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(CorruptArtifact, match=r"a\.json: is not JSON"):
        read_json(path)


def test_yaml_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(CorruptArtifact):
        read_yaml(path)


def test_checkpoint_round_trip_is_bit_equal(tmp_path: Path) -> None:
    checkpoint = FileCheckpoint(tmp_path / "c.npz")
    assert checkpoint.load() is None
    arrays = {"x/y": np.random.default_rng(0).normal(size=(3, 2)), "n": np.array(3)}
    checkpoint.save(arrays, {"step": 4})
    loaded = checkpoint.load()
    assert loaded is not None and loaded[1] == {"step": 4}
    assert loaded[0].keys() == arrays.keys()
    assert all(loaded[0][name].tobytes() == arrays[name].tobytes() for name in arrays)


def test_a_pickle_inside_a_checkpoint_is_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    np.savez(path, allow_pickle=True, x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(CorruptArtifact):
        FileCheckpoint(path).load()


def test_a_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    checkpoint = FileCheckpoint(tmp_path / "c.npz")
    checkpoint.save({"x": np.zeros(1000)}, {})
    content = checkpoint.path.read_bytes()
    checkpoint.path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptArtifact, match=r"c\.npz"):
        checkpoint.load()


def test_a_record_of_other_inputs_is_stale_and_says_which(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    path = tmp_path / "r.json"
    assert folder.read_record(path, {"data": "1"}) is None
    folder.write_record(path, {"value": 7}, {"data": "1", "space": "2"})
    found = folder.read_record(path, {"data": "1", "space": "2"})
    assert found is not None and found["value"] == 7
    with pytest.raises(StaleArtifact, match="another space than"):
        folder.read_record(path, {"data": "1", "space": "3"})


@pytest.mark.parametrize("content", [[], {"value": 7}, {"schema": 99, "inputs": {}}])
def test_a_record_of_another_shape_is_corrupt(tmp_path: Path, content: object) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(content))
    with pytest.raises(CorruptArtifact, match=r"r\.json"):
        RunFolder(tmp_path).read_record(path)


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.artifacts import RunFolder\n"
        "from pipeline.errors import RunLocked\n"
        "try:\n    with RunFolder(Path(sys.argv[1])).locked(): pass\n"
        "except RunLocked as e: print(e); sys.exit(2)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with RunFolder(tmp_path).locked():
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        with pytest.raises(RunLocked), RunFolder(tmp_path).locked():
            pass
    assert refused.returncode == 2 and "another process works on this run" in refused.stdout
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path) -> None:
    killed = (
        "import os, sys\nfrom pathlib import Path\nfrom pipeline.artifacts import replacing\n"
        "with replacing(Path(sys.argv[1])) as draft:\n    draft.write_text('half')\n    os._exit(9)\n"
    )
    for name in ("state.npz", "cpu/s/model.fp16.onnx"):
        subprocess.run([sys.executable, "-c", killed, str(tmp_path / name)], check=False)
    drafts = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(drafts) == 2
    names = (
        ".gitignore",
        ".data.json.original.json",
        "state.npz",
        "another-run/.lock",
        "another-run/.a.draft-1",
    )
    others = [tmp_path / name for name in names]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_text("stays")
    with RunFolder(tmp_path).locked():
        assert not any(path.exists() for path in drafts)
    assert all(path.read_text() == "stays" for path in others)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError), RunFolder(tmp_path / "run").locked():
        pass


def test_a_file_in_place_of_the_run_folder_says_so(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(StorageError, match="run"), RunFolder(tmp_path / "run").locked():
        pass


@pytest.mark.parametrize("relative", ["../x", "/etc/passwd", "a/../../x", "", "a\\..\\x", "a\0b"])
def test_paths_that_leave_the_folder_are_refused(tmp_path: Path, relative: str) -> None:
    with pytest.raises(CorruptArtifact, match="leaves the run folder"):
        inside(tmp_path, relative)


def test_links_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "link").symlink_to(tmp_path)
    with pytest.raises(CorruptArtifact, match="through a link"):
        inside(tmp_path / "run", "link/secret")
    assert inside(tmp_path / "run", "cpu/s/model.onnx") == tmp_path / "run/cpu/s/model.onnx"


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="not there"):
        read_json(tmp_path / "no.json")
