"""The command line: its surface, its speed, and what its commands print."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from tiny_run import DEVICE, TIERS, Cli

from pipeline import __version__
from pipeline.cli import app
from pipeline.data import DATA
from pipeline.evaluators import EVALUATORS
from pipeline.search import METHODS
from pipeline.spaces import SPACES

DESCRIPTION = (  # of a run
    "[config] --profile --data --method --space --evaluator --out --seed --device --set --workers "
    "--engine --ray-address --task-resources --json"
)
SURFACE = {
    "run": DESCRIPTION,
    "profile": DESCRIPTION,
    "search": "--out",
    "derive": "--out --tier --workers --engine --ray-address --task-resources",
    "retrain": "--out --tier --workers --engine --ray-address --task-resources",
    "export": "--out --tier --engine --ray-address --task-resources",
    "measure": "--out --tier --engine --ray-address --task-resources",
    "report": "--out",
    "dps": "--known --out --evaluations --members --jacov/--no-jacov --held-back [config] --data --space "
    "--seed --device --set",
    "kit make": "--out [config] --profile --data --space --seed --set --again --verify --device",
    "kit import": "results --profile",
    "list": "[folder] --json",
    "verify": "run_folder --device --remeasure/--no-remeasure --json",
    "select": "run_folder --latency-ms --params --flops --weight-bytes --memory-bytes --device --json",
    "doctor": "--json",
}
"""Command → its arguments (in brackets where they may be left out) and options. Scripts rely on these: what
goes or changes its name here breaks them."""


def commands() -> dict[str, Any]:
    found: dict[str, Any] = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    return found | {f"kit {name}": command for name, command in found.pop("kit").commands.items()}


def written(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return str(parameter.name) if parameter.required else f"[{parameter.name}]"
    return "/".join([*parameter.opts, *parameter.secondary_opts])


def test_the_command_line_is_the_one_that_scripts_rely_on() -> None:
    found = {name: " ".join(written(p) for p in command.params) for name, command in commands().items()}
    assert found == SURFACE


@pytest.mark.parametrize("command", SURFACE)
def test_every_command_shows_an_example_that_names_it(cli: Cli, command: str) -> None:
    text = re.sub(r"\s+", " ", cli(*command.split(), "--help").out)
    assert f"Example: budgetline {command}" in text


@pytest.mark.parametrize("command", SURFACE)
def test_examples_are_lines_that_parse(command: str) -> None:
    """Every option of an example is one of the command's."""
    epilog = commands()[command].epilog
    assert set(re.findall(r"--[a-z-]+", epilog)) <= set(re.findall(r"--[a-z-]+", SURFACE[command]))


def test_help_answers_at_once() -> None:
    """Seconds of processor time, since others may be at work on this machine: one try of three is enough."""

    def seconds() -> float:
        process = os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", "pipeline", "--help"],
            {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
        )
        _, status, usage = os.wait4(process, 0)
        assert status == 0
        return usage.ru_utime + usage.ru_stime

    assert any(seconds() < 0.5 for _ in range(3))


def test_version(cli: Cli) -> None:
    assert cli("--version").out == f"{__version__}\n"


def test_without_a_command_there_is_help(cli: Cli) -> None:
    assert "Start with: budgetline run" in cli().out


# ---------------------------------------------------------------------------------- how a run is described


def described(cli: Cli, root: Path, *words: object) -> dict[str, Any]:
    """run.yaml of a run whose first stage these words start."""
    outcome = cli("profile", "--profile", "profiles/params.yaml", "--out", root, *words)
    assert outcome.code == 0, outcome
    found: dict[str, Any] = yaml.safe_load((root / "run.yaml").read_text())
    return found


@pytest.fixture(autouse=True)
def at_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])


def test_flags_and_settings_override_the_file(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "seed: 1\nmethod: {name: importance}\nspace: {name: mbconv, size: tiny}\n"
        "retrain: {epochs: 9, lr: 0.2}\n"
    )
    words = ["--seed", 5, "--method", "random", "--space", "mbconv"]
    words += ["--set", "retrain.epochs=3", "--set", "retrain.distil.weight=0.25", "--set", "data.limit=150"]
    found = described(cli, tmp_path / "run", path, *words)
    assert (found["seed"], found["method"]["name"]) == (5, "random")
    assert found["space"]["size"] == "tiny", "a flag that names what the file names keeps the file's settings"
    assert (found["retrain"]["epochs"], found["retrain"]["lr"]) == (3, 0.2)
    assert found["retrain"]["distil"]["weight"] == 0.25
    assert found["data"] == {"name": "digits", "limit": 150}
    assert found["budgetline"] == __version__


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("retrain.epochs", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("retrain..lr=3", "expected KEY=VALUE"),
        ("retrain.lr=[1", "is not a YAML value"),
        ("retrain.rate=1", "unknown key 'rate'"),
        ("profiles.threads=2", "a profile's settings stand in its YAML file"),
        ("seed=2024-13-45", "'2024-13-45' is not a YAML value"),
        ("seed.x=2", "'seed' is 3, which has no settings of its own"),
    ],
)
def test_settings_that_say_nothing_are_refused(cli: Cli, tmp_path: Path, setting: str, message: str) -> None:
    words = ["--profile", "profiles/params.yaml", "--seed", 3, "--set", setting, "--out", tmp_path / "run"]
    outcome = cli("run", *words)
    assert outcome.code == 2 and outcome.crash is None and message in outcome.err
    assert not (tmp_path / "run" / "run.yaml").exists()


def test_flags_change_the_run_that_is_there(cli: Cli, finished: Path, tmp_path: Path) -> None:
    """Said again they go on with it; what differs is named; an unknown setting is one of its own method."""
    same = cli("profile", "--out", finished, "--data", "digits", "--set", "retrain.epochs=1")
    assert same.code == 0, same.err
    other = cli("profile", "--out", finished, "--set", "retrain.epochs=7", "--seed", 5)
    assert other.err.startswith(f"StaleArtifact: {finished}: holds a run with another seed, retrain;")
    unknown = cli("profile", "--out", finished, "--set", "method.learning_rate=1")
    message = f"ConfigError: {finished} and command line: method: unknown key 'learning_rate'; valid keys: "
    assert unknown.err.startswith(message) and "guide" in unknown.err
    assert cli("profile", "--out", tmp_path / "new", "--set", "space.size=enormous").err.startswith(
        "ConfigError: command line: space"
    )


def test_a_run_of_which_nothing_was_made_is_described_anew(cli: Cli, tmp_path: Path) -> None:
    """By flags that name images. What followed from the first description does not stay: here the evaluator
    and its evaluations."""
    out = tmp_path / "run"
    darts = described(cli, out, "--space", "nb201", "--method", "darts")
    assert (darts["evaluator"]["name"], darts["search"]["evaluations"]) == ("relaxed", 600)
    shutil.rmtree(out / "costs")
    again = described(cli, out, "--data", "digits", "--space", "nb201", "--method", "importance")
    assert (again["evaluator"]["name"], again["search"]["evaluations"]) == ("one-shot", 400)


@pytest.mark.parametrize(("name", "batch_size"), [("relaxed", 32), ("relaxed-adversarial", 64)])
def test_a_flag_that_names_what_is_there_by_default_keeps_its_settings(
    cli: Cli, tmp_path: Path, name: str, batch_size: int
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("method: darts\nspace: nb201\nevaluator: {batch_size: 32}\n")
    found = described(cli, tmp_path / "run", path, "--evaluator", name)["evaluator"]
    assert (found["name"], found["batch_size"]) == (name, batch_size)


def test_a_run_s_own_description_describes_another_run(cli: Cli, tmp_path: Path) -> None:
    first = described(cli, tmp_path / "first", "--data", "digits", "--set", "data.limit=150")
    outcome = cli("profile", tmp_path / "first" / "run.yaml", "--out", tmp_path / "second")
    assert outcome.code == 0, outcome
    assert yaml.safe_load((tmp_path / "second" / "run.yaml").read_text()) == first


def test_flags_change_a_run_of_which_nothing_was_made(cli: Cli, tmp_path: Path) -> None:
    """One that waits for its device, or was stopped before its first measurement, is no other run for it."""
    out = tmp_path / "run"
    described(cli, out, "--data", "digits", "--space", "nb201", "--set", "data.limit=150")
    shutil.rmtree(out / "costs")
    changed = cli("profile", "--out", out, "--set", "retrain.epochs=300")
    assert changed.code == 0, changed
    found = yaml.safe_load((out / "run.yaml").read_text())
    assert (found["space"]["name"], found["data"]["limit"], found["retrain"]["epochs"]) == ("nb201", 150, 300)


def test_a_folder_of_images_without_the_word_is_understood(cli: Cli, tmp_path: Path) -> None:
    outcome = cli("profile", "--data", tmp_path, "--out", tmp_path / "run")
    assert outcome.code == 2 and f"data '{tmp_path}' is a folder; say image-folder:{tmp_path}" in outcome.err


def test_help_lists_all_that_there_is(cli: Cli) -> None:
    words = set(re.findall(r"[a-z0-9-]+", cli("run", "--help").out))
    for catalogue in (METHODS, SPACES, EVALUATORS, DATA):
        assert set(catalogue) <= words, set(catalogue) - words


def test_a_run_s_folder_is_named_after_what_describes_it(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = Path("profiles/params.yaml").resolve()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("seed: 1\n")
    assert cli("profile", "mine.yaml", "--profile", profile).code == 0
    assert cli("profile", "--profile", profile, "--data", "image-folder:photos/cats").code == 2
    assert cli("profile", "--profile", profile, "--data", "photos").code == 2
    assert cli("profile", "--profile", profile).code == 0
    assert sorted(path.name for path in (tmp_path / "exports").iterdir()) == ["cats", "digits", "mine"]


# ------------------------------------------------------------------------------------------ using a family


def test_list_shows_every_tier_of_every_run(cli: Cli, finished: Path) -> None:
    for folder in (finished, finished.parent):
        outcome = cli("list", folder)
        assert outcome.code == 0 and outcome.err == ""
        for word in ("tiny: digits", *(f"│ {tier} " for tier in TIERS), "manifest.json", "report.html"):
            assert word in outcome.out
    [found] = json.loads(cli("list", finished.parent, "--json").out)
    assert found["path"] == str(finished) and [tier["name"] for tier in found["tiers"]] == list(TIERS)


def test_list_names_a_run_it_cannot_read_and_shows_the_rest(cli: Cli, copied: Path) -> None:
    damaged = copied.parent / "damaged"
    damaged.mkdir()
    (damaged / "manifest.json").write_text('{"schema"')
    outcome = cli("list", copied.parent)
    assert outcome.code == 2 and "tiny: digits" in outcome.out
    assert f"CorruptArtifact: {damaged / 'manifest.json'}" in outcome.err


def test_list_where_there_is_nothing(cli: Cli, tmp_path: Path) -> None:
    assert "no finished run" in cli("list", tmp_path).out
    outcome = cli("list", tmp_path / "absent")
    assert outcome.code == 2 and "is no folder" in outcome.err


def test_select_prints_the_most_accurate_that_fits(cli: Cli, finished: Path) -> None:
    tiers = json.loads((finished / "manifest.json").read_text())["tiers"]
    limit = max(tier["params"] for tier in tiers) - 1
    fitting = [tier for tier in tiers if tier["params"] <= limit]
    best = max(fitting, key=lambda tier: (tier["accuracy"]["architecture"], -tier["params"]))
    outcome = cli("select", finished, "--params", limit)
    assert (outcome.code, outcome.out, outcome.err) == (0, f"{finished / best['answer']}\n", "")
    assert Path(outcome.out.strip()).is_file()
    found = json.loads(cli("select", finished, "--params", limit, "--json").out)
    assert (found["name"], found["path"]) == (best["name"], str(finished / best["answer"]))


def test_select_names_no_file_that_is_not_the_measured_one(cli: Cli, copied: Path) -> None:
    best = Path(cli("select", copied).out.strip())
    content = best.read_bytes()
    best.write_bytes(content + b" ")
    changed = cli("select", copied)
    best.unlink()
    gone = cli("select", copied)
    for outcome in (changed, gone):
        assert (outcome.code, outcome.out) == (
            2,
            "",
        ) and f"CorruptArtifact: {best}: is not the file" in outcome.err
    best.write_bytes(content)
    assert cli("select", copied).out == f"{best}\n"


def test_brackets_in_a_path_are_no_markup(cli: Cli, copied: Path) -> None:
    for name in ("run[v2]", "run[/b]", "run:smile:"):
        shutil.copytree(copied, copied.parent / name)
        outcome = cli("list", copied.parent / name)
        assert outcome.code == 0 and f"manifest  {copied.parent / name / 'manifest.json'}" in outcome.out, (
            outcome
        )


def test_select_says_what_the_least_is_where_nothing_fits(cli: Cli, finished: Path) -> None:
    outcome = cli("select", finished, "--params", "1", "--flops", "1k")
    assert (outcome.code, outcome.out) == (1, "")
    assert "nothing fits; the least params is" in outcome.err and "(tier s)" in outcome.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--params", "many"], "params is 'many': is not a number with a unit"),
        (["--params", "-1k"], "must be a finite number above zero"),
        (["--params", "3 MiB"], "unknown unit 'MiB'"),
        (["--latency-ms", "1"], "latency_ms"),
        (["--device", "phone", "--params", "1M"], "phone"),
    ],
)
def test_select_refuses_limits_that_mean_nothing_here(
    cli: Cli, finished: Path, words: list[str], message: str
) -> None:
    outcome = cli("select", finished, *words)
    assert outcome.code == 2 and outcome.crash is None and outcome.out == "" and message in outcome.err


def test_verify_passes_and_says_what_it_checked(cli: Cli, finished: Path) -> None:
    outcome = cli("verify", finished)
    assert outcome.code == 0, outcome
    checks = json.loads(cli("verify", finished, "--json").out)
    assert {check["ok"] for check in checks} == {True}
    kinds = {check["check"].split()[0] for check in checks}
    assert kinds == {"schema", "file", "graph", "logits", "budget"}


def test_verify_fails_on_a_model_that_was_changed(cli: Cli, copied: Path) -> None:
    with (copied / DEVICE / "s" / "model.onnx").open("ab") as file:
        file.write(b"\0")
    outcome = cli("verify", copied)
    assert outcome.code == 1 and outcome.crash is None and "FAILED" in outcome.out


def test_doctor_reports_as_table_and_json(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.devices import environment

    checks = [
        environment.Check("python", "ok", "3.11"),
        environment.Check("CUDA", "warn", "does not open", "buy"),
    ]
    monkeypatch.setattr(environment, "doctor", lambda: checks)
    outcome = cli("doctor")
    assert outcome.code == 0 and "does not open" in outcome.out
    assert [check["status"] for check in json.loads(cli("doctor", "--json").out)] == ["ok", "warn"]
    checks.append(environment.Check("onnxruntime", "fail", "is not installed", "install it"))
    assert cli("doctor").code == 1


def test_a_finished_run_prints_its_family_again_and_json_for_machines(cli: Cli, finished: Path) -> None:
    outcome = cli("run", "--out", finished)
    assert outcome.code == 0 and "test accuracy" in outcome.out
    assert " params" in outcome.out and "latency" not in outcome.out, "nothing was timed"
    manifest = json.loads(cli("run", "--out", finished, "--json").out)
    assert manifest == json.loads((finished / "manifest.json").read_text())


def test_a_proxy_is_not_tuned_on_what_cannot_be_read(cli: Cli, tmp_path: Path) -> None:
    known = tmp_path / "known.csv"
    known.write_text("arch,accuracy\n")
    for path, told in ((tmp_path / "none.csv", "none.csv"), (known, "known.csv")):
        outcome = cli("dps", "--known", path, "--out", tmp_path / "eproxy.yaml", "--space", "nb201")
        assert outcome.code == 2 and outcome.crash is None and told in outcome.err
    assert not (tmp_path / "eproxy.yaml").exists()


def test_a_proxy_is_tuned_as_the_flags_say(cli: Cli, tmp_path: Path) -> None:
    known, out = tmp_path / "known.csv", tmp_path / "eproxy.yaml"
    chosen = ((3, 1), (1, 1), (2, 3), (3, 2), (3, 3))
    rows = [f'"[{a}, {b}, 3, 1, 2, 2]",{10 * a + b}' for a, b in chosen]
    known.write_text("\n".join(["arch,accuracy", *rows]))
    small = ("--set", "evaluator={name: eproxy, iterations: 2, branches: [{channels: 16}]}")
    asked = ("dps", "--known", known, "--out", out, "--space", "nb201", "--set", "space.channels=4", *small)
    outcome = cli(*asked, "--evaluations", 4, "--members", 2, "--held-back", 0)
    assert outcome.code == 0, outcome.err
    assert "no architecture was held back" in outcome.out
    found = yaml.safe_load(out.read_text())
    assert len(found["members"]) == 2 and found["jacov"]["deviation"] > 0
    assert json.loads(out.with_suffix(".json").read_text())["evaluations"] == 4
