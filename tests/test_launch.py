"""Training commands start once more, tuned and otherwise exactly as they were started; the others do not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import launch
from pipeline.launch import TRAINING_COMMANDS, needs_tuning


@pytest.mark.parametrize("command", sorted(TRAINING_COMMANDS))
def test_training_commands_are_tuned_once(command: str) -> None:
    assert needs_tuning([command, "--seed", "1"], {}, "linux")
    assert not needs_tuning([command], {"BUDGETLINE_TUNED": "1"}, "linux")


@pytest.mark.parametrize(
    ("words", "environment", "platform"),
    [
        ([], {}, "linux"),
        (["--version"], {}, "linux"),
        (["verify", "run"], {}, "linux"),
        (["run", "--help"], {}, "linux"),
        (["run"], {}, "darwin"),
        (["run"], {"BUDGETLINE_NO_TUNING": "1"}, "linux"),
    ],
)
def test_the_rest_are_left_alone(words: list[str], environment: dict[str, str], platform: str) -> None:
    assert not needs_tuning(words, environment, platform)


def test_no_tuning_can_be_turned_on_again() -> None:
    assert needs_tuning(["run"], {"BUDGETLINE_NO_TUNING": "0"}, "linux")


def test_it_starts_as_it_was_started_and_keeps_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []

    def execve(path: str, words: list[str], environment: dict[str, str]) -> None:
        started.extend((path, words, environment))
        raise SystemExit

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "argv", ["/bin/budgetline", "run", "--seed", "1"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-I", "/bin/budgetline", "run", "--seed", "1"])
    monkeypatch.delenv("BUDGETLINE_TUNED", raising=False)
    monkeypatch.delenv("BUDGETLINE_NO_TUNING", raising=False)
    monkeypatch.setenv("MALLOC_TOP_PAD_", "7")
    monkeypatch.setattr(os, "execve", execve)
    with pytest.raises(SystemExit):
        launch.main()
    path, words, environment = started
    assert path == sys.executable
    assert words == [sys.executable, "-I", "/bin/budgetline", "run", "--seed", "1"]
    assert environment["MALLOC_TOP_PAD_"] == "7"
    assert environment["MALLOC_MMAP_MAX_"] == "0"
    assert environment["BUDGETLINE_TUNED"] == "1"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is tuned")
def test_a_folder_called_pipeline_in_the_working_directory_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text("raise SystemExit('the wrong package')")
    script = tmp_path / "bin" / "budgetline"
    script.parent.mkdir()
    script.write_text("from pipeline.launch import main\nmain()\n")
    package = str(Path(launch.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, str(script), "run", "--seed", "none"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": package, "BUDGETLINE_NO_TUNING": "0"},
        capture_output=True,
        text=True,
    )
    assert "the wrong package" not in done.stderr
    assert done.returncode == 2 and "--seed" in done.stderr


def hears_signals() -> None:
    """Also where these tests were started in the background, whose children ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_asked_to_stop_says_so(
    number: signal.Signals, code: int, tiny_yaml: Path, tmp_path: Path
) -> None:
    """As soon as it has said what it is about to do, which takes it hours."""
    words = ["run", tiny_yaml, "--out", tmp_path / "run", "--set", "search.warm_up=1000000"]
    command = [sys.executable, "-m", "pipeline", *map(str, words)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hears_signals) as run:
        assert run.stderr is not None
        assert any(line.startswith("plan: ") for line in run.stderr)
        run.send_signal(number)
        try:
            said = run.communicate(timeout=60)[1]
        finally:
            run.kill()
    assert run.returncode == code
    assert said.splitlines()[-1] == "stopped; nothing is lost: the same command goes on from here"
