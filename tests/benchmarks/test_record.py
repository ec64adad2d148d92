from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import record
from benchmarks.record import Evidence, at_least, at_most, markdown_table, none_of, run_script, start_tuned
from pipeline.devices.environment import MALLOC
from pipeline.errors import ConfigError
from pipeline.launch import ONEDNN


@pytest.mark.parametrize(
    ("target", "passed"),
    [
        (at_least("a", 98.0, 98), True),
        (at_least("a", 97.999, 98), False),
        (at_most("a", 1.1, 1.1), True),
        (at_most("a", 1.10001, 1.1), False),
        (none_of("a", []), True),
        (none_of("a", ["weights"]), False),
    ],
)
def test_a_target_holds_at_its_limit_and_not_beyond(target: record.Target, passed: bool) -> None:
    assert target.passed is passed


def test_a_target_says_what_came() -> None:
    assert at_least("largest", 91.234, 91.5, " %").came == "91.23 %"
    assert none_of("differs", ["weights", "trace"]).came == "weights, trace"


def test_the_record_has_what_a_reader_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evidence = Evidence("quickstart", ["--json", "my file.json"])
    path = tmp_path / "record.json"
    targets = [at_least("largest", 99.0, 98), at_most("job", 200, 180, " s")]
    reached = evidence.finish(path, seeds=[3], numbers={"x": 1.5}, targets=targets, table="| a |")
    assert reached is False
    written = json.loads(path.read_text())
    assert written["command"] == "python -m benchmarks.quickstart --json 'my file.json'"
    assert written["date"].endswith("Z")
    assert written["seeds"] == [3] and written["numbers"] == {"x": 1.5}
    assert {"cpu", "cores", "gpu", "load_before", "load_after"} <= written["hardware"].keys()
    assert {"python", "torch", "numpy"} <= written["versions"].keys()
    assert [target["passed"] for target in written["targets"]] == [True, False]
    shown = capsys.readouterr().out
    assert "| a |" in shown and "| job | ≤ 180 s | 200 s | **missed** |" in shown
    assert list(tmp_path.iterdir()) == [path]


def test_a_markdown_table_has_a_rule_below_its_headings() -> None:
    assert markdown_table(["tier", "ms"], [["s", 1]]).splitlines() == [
        "| tier | ms |",
        "| --- | ---: |",
        "| s | 1 |",
    ]


@pytest.mark.parametrize(("answer", "code"), [(True, 0), (False, 1)])
def test_a_script_tells_by_its_exit_whether_all_was_shown(answer: bool, code: int) -> None:
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: answer)
    assert ended.value.code == code


def test_a_script_that_cannot_begin_says_why_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> bool:
        raise ConfigError("runs/x.yaml: unknown key")

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "ConfigError: runs/x.yaml: unknown key\n"


def test_a_script_starts_itself_once_with_the_environment_of_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    starts: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda path, words, environment: starts.append((words, environment)))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "argv", ["step_ratio.py", "--pairs", "3"])
    for name in (*MALLOC, *ONEDNN, "BUDGETLINE_TUNED", "BUDGETLINE_NO_TUNING"):
        monkeypatch.delenv(name, raising=False)
    start_tuned("step_ratio")
    ((words, environment),) = starts
    assert words[1:] == ["-m", "benchmarks.step_ratio", "--pairs", "3"]
    assert {**MALLOC, **ONEDNN}.items() <= environment.items()
    monkeypatch.setattr(os, "environ", environment)
    start_tuned("step_ratio")
    assert len(starts) == 1


CHILD = """
import signal, sys, time
def end(number, frame):
    print("child ends", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("child works", flush=True)
time.sleep(60)
"""

SCRIPT = f"""
import sys
from benchmarks.record import run_script, run_to_end
run_script(lambda: run_to_end([sys.executable, "-c", {CHILD!r}]) == 0)
"""


def test_a_script_that_is_stopped_stops_what_it_has_started(root: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True, cwd=root
    ) as script:
        assert script.stdout is not None
        assert script.stdout.readline() == "child works\n"
        script.send_signal(signal.SIGTERM)
        try:
            said = script.communicate(timeout=30)[0]
        finally:
            script.kill()
    assert (said, script.returncode) == ("child ends\n", 143)
