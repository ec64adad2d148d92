"""Whole runs, small: what they leave, that they go on where they stopped, and that devices are obeyed."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from tiny_run import DEVICE, TIERS, TINY, Cli

from pipeline import run as run_module
from pipeline.artifacts import sha256_file
from pipeline.costs import bench
from pipeline.devices import profile as device_profile
from pipeline.devices.measure import Patience
from pipeline.devices.session import RuntimeSettings
from pipeline.errors import MeasurementError
from pipeline.progress import Silent
from pipeline.report.manifest import read_manifest
from pipeline.stages import derive as derive_module
from pipeline.stages.lineage import inputs_of_tier
from pipeline.stages.misses import misses_of
from pipeline.stages.records import TIER_RECORDS
from pipeline.stages.report import report_stage
from pipeline.types import Json, LatencyRecord

RECORDS = ("arch", "train", "export", "measure")


def manifest_of(root: Path) -> Json:
    found: Json = json.loads((root / "manifest.json").read_text())
    return found


def written(root: Path) -> dict[str, int]:
    """Every file and when it was written, but for the lock and what every `run` makes anew."""
    anew = ("manifest.json", "report.html", ".lock")
    return {
        path.relative_to(root).as_posix(): path.stat().st_mtime_ns
        for path in root.rglob("*")
        if path.is_file() and path.name not in anew
    }


def rewrite(root: Path, **sections: Any) -> None:
    """Change what the run was asked for, by hand."""
    path = root / "run.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **sections}))


# ------------------------------------------------------------------------------------------- a finished run


def test_a_run_leaves_its_plan_and_nothing_else(finished: Path) -> None:
    tier_files = [f"{name}.json" for name in RECORDS]
    tier_files += ["model.batch1.onnx", "model.onnx", "samples.npz", "weights.safetensors"]
    expected = {"run.yaml", f"costs/{DEVICE}.json"}
    expected |= {f"search/{name}" for name in ("result.json", "evaluator.npz", "trace.jsonl")}
    expected |= {f"{DEVICE}/{tier}/{name}" for tier in TIERS for name in tier_files}
    trials = {name for name in written(finished) if name.startswith("search/trials/")}
    assert set(written(finished)) == expected | trials
    assert trials and all(name.endswith(".json") for name in trials)


def test_the_manifest_is_valid_and_its_budgets_are_kept(finished: Path) -> None:
    manifest = read_manifest(finished)
    assert [(tier["device"], tier["name"]) for tier in manifest["tiers"]] == [(DEVICE, t) for t in TIERS]
    for tier in manifest["tiers"]:
        assert tier["budgets"].keys() <= tier["measured"].keys()
        assert all(tier["measured"][metric] <= limit for metric, limit in tier["budgets"].items())
        assert all(0 <= tier["accuracy"][split] <= 1 for split in ("architecture", "test"))
    assert set(manifest["tiers"][1]["budgets"]) == {"params", "flops"}
    assert manifest["search"]["method"] == "importance" and manifest["search"]["evaluations"] == 12
    assert manifest["data"]["splits"]["weights"] + manifest["data"]["splits"]["architecture"] == 200


def test_every_file_of_the_manifest_is_there_with_its_hash(finished: Path) -> None:
    for tier in manifest_of(finished)["tiers"]:
        assert {file["role"] for file in tier["files"]} == {"onnx", "onnx-batch1", "weights", "samples"}
        for file in tier["files"]:
            assert sha256_file(finished / file["path"]) == file["sha256"]


def test_the_models_carry_what_a_consumer_needs(finished: Path) -> None:
    model = onnx.load(str(finished / DEVICE / "s" / "model.onnx"))
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(properties["classes"]) == [str(digit) for digit in range(10)]
    assert (properties["tier"], properties["profile"], properties["run"]) == ("s", DEVICE, "tiny")
    assert json.loads(properties["mean"]) == manifest_of(finished)["data"]["mean"]
    assert "/" not in properties["data"], "no path of this machine travels with the model"


def test_the_report_needs_no_network_and_no_other_file(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    targets = re.findall(r"""(?:src|href|action|data)\s*=\s*["']?([^"'\s>]+)""", page)
    links = {target for target in targets if not target.startswith(("#", "data:"))}
    assert all("//" not in link and (finished / link).is_file() for link in links), links
    assert not re.findall(r"@import|url\((?!['\"]?(?:#|data:))", page)
    assert not re.findall(r"""src\s*=\s*["'](?!data:)""", page)
    for tier in TIERS:
        assert f">{tier}<" in page


def test_the_trace_has_a_line_per_iteration(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "search" / "trace.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(len(lines)))
    assert [line["stage"] for line in lines[:3]] == ["warm_up", "warm_up", "search"]
    assert {tier["tier"] for tier in lines[2]["tiers"]} == {f"{DEVICE}/{tier}" for tier in TIERS}


def test_the_test_split_was_not_tried_on(finished: Path) -> None:
    """Accuracies that something was chosen by are of the architecture split: multiples of 1 / its size."""
    manifest = manifest_of(finished)
    images = manifest["data"]["splits"]["architecture"]
    chosen_by = [point["accuracy"] for point in manifest["search"]["ranking"]["points"]]
    chosen_by += [tier["accuracy"]["architecture"] for tier in manifest["tiers"]]
    assert chosen_by and all(abs(x * images - round(x * images)) < 1e-6 for x in chosen_by)


# -------------------------------------------------------------------------------------------------- going on


def test_running_again_makes_nothing_anew(cli: Cli, copied: Path, tiny_yaml: Path) -> None:
    def told() -> Json:
        return {**manifest_of(copied), "created": None, "environment": None}

    files, manifest = written(copied), told()
    assert cli("run", "--out", copied).code == 0
    assert cli("run", tiny_yaml, "--out", copied).code == 0
    assert written(copied) == files and told() == manifest


def test_another_description_is_refused_and_named(cli: Cli, finished: Path, tiny_yaml: Path) -> None:
    before = written(finished)
    outcome = cli("run", tiny_yaml, "--seed", 1, "--set", "retrain.epochs=2", "--out", finished)
    assert outcome.code == 2 and outcome.crash is None
    assert outcome.err.startswith(f"StaleArtifact: {finished}: holds a run with another seed, retrain;")
    assert written(finished) == before


def test_a_record_made_from_something_else_is_never_used(cli: Cli, copied: Path) -> None:
    rewrite(copied, seed=1)
    outcome = cli("run", "--out", copied)
    assert outcome.code == 2 and outcome.crash is None
    assert re.search(
        r"StaleArtifact: .*result\.json: was made from another .* than there is now", outcome.err
    )


def test_stages_one_by_one_make_what_run_makes(
    cli: Cli, finished: Path, tiny_yaml: Path, tmp_path: Path
) -> None:
    root = tmp_path / "tiny"
    for words in (
        ["profile", tiny_yaml],
        ["search"],
        ["derive", "--tier", "l"],
        ["derive"],
        ["retrain", "--tier", f"{DEVICE}/s"],
        ["retrain"],
        ["export", "--tier", "s"],
        ["measure", "--tier", "s"],
    ):
        outcome = cli(*words, "--out", root)
        assert outcome.code == 0, outcome
    same = [f"{DEVICE}/{tier}/weights.safetensors" for tier in TIERS]
    same += [f"{DEVICE}/s/model.onnx", f"{DEVICE}/s/model.batch1.onnx", "search/trace.jsonl"]
    for name in same:
        assert sha256_file(root / name) == sha256_file(finished / name), name
    assert not (root / DEVICE / "l" / "export.json").exists()
    outcome = cli("report", "--out", root)
    assert outcome.code == 2 and "run `budgetline export --out" in outcome.err


def test_one_tier_is_redone_alone(cli: Cli, copied: Path) -> None:
    before = written(copied)
    (copied / DEVICE / "s" / "train.json").unlink()
    weights = sha256_file(copied / DEVICE / "s" / "weights.safetensors")
    assert cli("retrain", "--tier", "s", "--out", copied).code == 0
    assert sha256_file(copied / DEVICE / "s" / "weights.safetensors") == weights
    changed = {name for name, when in written(copied).items() if before.get(name) != when}
    assert changed == {f"{DEVICE}/s/train.json", f"{DEVICE}/s/weights.safetensors"}


@pytest.mark.parametrize("stage", ["derive", "retrain", "export", "measure", "report"])
@pytest.mark.parametrize(
    ("sections", "what"),
    [
        ({"data": {"name": "digits", "limit": 150}}, "data"),
        ({"data": {**TINY["data"], "flip": True}}, "augmentation"),
        ({"profiles": [{**TINY["profiles"][0], "opset": 19}]}, "profile"),
    ],
)
def test_a_stage_alone_does_not_mix_what_was_made_from_something_else(
    cli: Cli, copied: Path, stage: str, sections: Json, what: str
) -> None:
    """Above all the test split of other images, some of which the weights may have seen."""
    rewrite(copied, **sections)
    before = written(copied)
    if stage in TIER_RECORDS:
        (copied / DEVICE / "s" / f"{TIER_RECORDS[stage]}.json").unlink()
        before.pop(f"{DEVICE}/s/{TIER_RECORDS[stage]}.json")
    outcome = cli(stage, "--out", copied)
    assert outcome.code == 2 and outcome.crash is None, outcome
    assert re.match(rf"StaleArtifact: .*\.json: was made from another .*\b{what}\b", outcome.err), outcome.err
    assert written(copied) == before


def test_a_report_is_of_records_that_belong_together(cli: Cli, copied: Path) -> None:
    """A tier that was trained anew needs its files anew."""
    rewrite(copied, retrain={"epochs": 2})
    for tier in TIERS:
        (copied / DEVICE / tier / "train.json").unlink()
    assert cli("retrain", "--out", copied).code == 0
    outcome = cli("report", "--out", copied)
    assert outcome.code == 2 and "export.json: was made from another weights" in outcome.err, outcome
    for tier in TIERS:
        (copied / DEVICE / tier / "export.json").unlink()
        (copied / DEVICE / tier / "measure.json").unlink()
    assert cli("run", "--out", copied).code == 0


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("model.onnx", "export"),
        ("model.batch1.onnx", "export"),
        ("samples.npz", "export"),
        ("weights.safetensors", "train"),
    ],
)
def test_a_report_does_not_vouch_for_a_file_that_was_changed(
    cli: Cli, copied: Path, name: str, record: str
) -> None:
    path = copied / DEVICE / "s" / name
    path.write_bytes(path.read_bytes() + b"0")
    outcome = cli("report", "--out", copied)
    assert outcome.code == 2 and outcome.crash is None, outcome
    remedy = path.with_name(f"{record}.json")
    assert f"CorruptArtifact: {path}: is not the file that was made; remove {remedy}" in outcome.err


def test_an_unknown_tier_is_told_which_there_are(cli: Cli, finished: Path) -> None:
    outcome = cli("retrain", "--tier", "xl", "--out", finished)
    assert outcome.code == 2 and f"no tier 'xl'; there are: {DEVICE}/s, {DEVICE}/l" in outcome.err


@pytest.mark.parametrize(
    ("gone", "stage", "first"),
    [
        (f"costs/{DEVICE}.json", "search", "profile"),
        ("search/result.json", "derive", "search"),
        (f"{DEVICE}/l/arch.json", "retrain", "derive"),
        (f"{DEVICE}/l/train.json", "export", "retrain"),
        (f"{DEVICE}/l/export.json", "measure", "export"),
        (f"{DEVICE}/l/measure.json", "report", "measure"),
    ],
)
def test_a_stage_before_its_turn_says_what_comes_first(
    cli: Cli, copied: Path, gone: str, stage: str, first: str
) -> None:
    (copied / gone).unlink()
    outcome = cli(stage, "--out", copied)
    assert outcome.code == 2 and outcome.crash is None
    assert f"{copied / gone}: not there; run `budgetline {first} --out {copied}` first" in outcome.err


def test_records_are_of_the_device_as_it_was_measured_and_of_the_operator_set(finished: Path) -> None:
    run = run_module.open_run(finished, None, Silent())
    [profile], tier = run.config.profiles, run.tiers[0]
    measured = inputs_of_tier(run, tier, "measure")
    assert measured["costs of the device"] == sha256_file(finished / "costs" / f"{DEVICE}.json")
    exported = inputs_of_tier(run, tier, "export")
    newer = profile.model_copy(update={"opset": profile.opset + 1})
    run.config = replace(run.config, profiles=(newer,))
    assert inputs_of_tier(run, tier, "export") != exported


def test_brief_trainings_are_paid_for_once(cli: Cli, copied: Path) -> None:
    arch = json.loads((copied / DEVICE / "l" / "arch.json").read_text())["arch"]
    before = {name: when for name, when in written(copied).items() if "trials" in name}
    (copied / DEVICE / "l" / "arch.json").unlink()
    assert cli("derive", "--out", copied).code == 0
    assert {name: when for name, when in written(copied).items() if "trials" in name} == before
    assert json.loads((copied / DEVICE / "l" / "arch.json").read_text())["arch"] == arch


def test_trials_belong_to_the_search_whose_weights_they_start_from(cli: Cli, copied: Path) -> None:
    """Fresh weights owe nothing to a search, and lead elsewhere."""

    def trials() -> dict[Path, Json]:
        return {path: json.loads(path.read_text()) for path in copied.glob("search/trials/*.json")}

    def accuracy(records: dict[Path, Json]) -> dict[str, float]:
        return {json.dumps(record["arch"]): record["accuracy"] for record in records.values()}

    of_search = trials()
    assert of_search and all("search" in record["inputs"] for record in of_search.values())
    for path in copied.glob(f"{DEVICE}/*/arch.json"):
        path.unlink()
    rewrite(copied, derive={**TINY["derive"], "trial_start": "scratch"})
    outcome = cli("derive", "--out", copied)
    assert outcome.code == 0, outcome
    fresh = {path: record for path, record in trials().items() if path not in of_search}
    assert fresh and not any("search" in record["inputs"] for record in fresh.values())
    before, now = accuracy(of_search), accuracy(fresh)
    assert any(before[arch] != now[arch] for arch in before.keys() & now.keys())


def test_contenders_are_trained_in_full_and_the_best_keeps_its_weights(cli: Cli, copied: Path) -> None:
    """Once: neither is the chosen one trained again, nor are they where a tier is derived anew."""
    for path in copied.glob(f"{DEVICE}/*/*.json"):
        path.unlink()
    rewrite(copied, derive={**TINY["derive"], "contenders": 2})
    outcome = cli("run", "--out", copied)
    assert outcome.code == 0, outcome
    kept = {path: json.loads(path.read_text()) for path in copied.glob("search/contenders/*.json")}
    assert all(path.with_suffix(".safetensors").exists() for path in kept)
    assert not list(copied.glob("search/contenders/*.npz"))
    for tier in TIERS:
        record = json.loads((copied / DEVICE / tier / "arch.json").read_text())
        full = {json.dumps(trial["arch"]): trial["full_accuracy"] for trial in record["trials"]}
        trained = [accuracy for accuracy in full.values() if accuracy is not None]
        assert len(trained) == 2 and full[json.dumps(record["arch"])] == max(trained)
        network = json.loads((copied / DEVICE / tier / "train.json").read_text())
        assert network.pop("adopted") and network in kept.values()
        assert network["accuracy"] / 100 == pytest.approx(max(trained))
    stages, trials = manifest_of(copied)["stages"], copied.glob("search/trials/*.json")
    in_full = sum(record["seconds"] for record in kept.values())
    assert stages["retrain"] == pytest.approx(in_full, abs=0.01), "each once, whoever has them"
    own = [json.loads((copied / DEVICE / tier / "arch.json").read_text())["seconds"] for tier in TIERS]
    brief = sum(json.loads(path.read_text())["seconds"] for path in trials)
    assert stages["derive"] == pytest.approx(sum(own) + brief, abs=0.01)
    written_then = written(copied)
    (copied / DEVICE / "s" / "arch.json").unlink()
    assert cli("derive", "--out", copied).code == 0
    contenders = {name: when for name, when in written_then.items() if "contenders" in name}
    assert contenders.items() <= written(copied).items()
    assert cli("run", "--out", copied).code == 0 and cli("verify", copied).code == 0


def test_contenders_have_no_teacher_so_with_one_the_chosen_are_trained_again(cli: Cli, copied: Path) -> None:
    for path in copied.glob(f"{DEVICE}/*/*.json"):
        path.unlink()
    rewrite(copied, derive={**TINY["derive"], "contenders": 2}, retrain={"epochs": 1, "distil": {}})
    for stage in ("derive", "retrain"):
        outcome = cli(stage, "--out", copied)
        assert outcome.code == 0, outcome
    kept = [json.loads(path.read_text()) for path in copied.glob("search/contenders/*.json")]
    assert kept and all(record["recipe"]["distil"] is None for record in kept)
    trained = [json.loads((copied / DEVICE / tier / "train.json").read_text()) for tier in TIERS]
    assert all(record["recipe"]["distil"] for record in trained)
    by_arch = {record["inputs"]["architecture"]: record["sha256"] for record in kept}
    assert by_arch[trained[0]["inputs"]["architecture"]] != trained[0]["sha256"]


def test_the_best_that_the_search_has_seen_comes_first_in_the_pool(finished: Path) -> None:
    """Of a band with more networks than can be looked at the first ones are."""
    run = run_module.open_run(finished, None, Silent())
    candidates = json.loads((finished / "search" / "result.json").read_text())["candidates"]
    choices, _, _ = min(candidates, key=lambda candidate: candidate[1])
    pool = derive_module._candidate_pool(run)
    assert pool[0].choices == tuple(choices)
    assert {tuple(seen) for seen, _, _ in candidates} <= {arch.choices for arch in pool}
    assert len(set(pool)) == len(pool)


def test_the_largest_tier_is_trained_first_and_teaches(cli: Cli, copied: Path) -> None:
    """`--tier s` alone brings its teacher along; first weights come from the supernet."""
    recipe = {"epochs": 1, "start": "supernet", "distil": {"weight": 0.5}}
    rewrite(copied, retrain=recipe)
    before = [sha256_file(copied / DEVICE / tier / "weights.safetensors") for tier in TIERS]
    for tier in TIERS:
        (copied / DEVICE / tier / "train.json").unlink()
    outcome = cli("retrain", "--tier", "s", "--out", copied)
    assert outcome.code == 0, outcome
    assert outcome.err.index(f"retrain {DEVICE}/l") < outcome.err.index(f"retrain {DEVICE}/s")
    after = [sha256_file(copied / DEVICE / tier / "weights.safetensors") for tier in TIERS]
    assert all(x != y for x, y in zip(before, after, strict=True))


def test_a_report_is_made_of_any_trace(cli: Cli, copied: Path) -> None:
    """Methods without distributions trace losses alone, and a short search traces next to nothing."""
    trace = copied / "search" / "trace.jsonl"
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    for line in lines:
        line.pop("tiers", None)
    for kept in (lines, lines[:1], []):
        trace.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
        outcome = cli("report", "--out", copied)
        assert outcome.code == 0, outcome


# --------------------------------------------------------------------------------------------------- latency


def known_ms(path: Path) -> float:
    """0.01 ms, and a nanosecond per weight."""
    weights = onnx.load(str(path)).graph.initializer
    return 0.01 + 1e-6 * sum(int(np.prod(weight.dims)) for weight in weights)


class Stopwatch:
    """A device on which latencies are known; `factor` makes the files that ship slower than they were."""

    def __init__(self) -> None:
        self.factor = 1.0
        self.slows: Callable[[Path], bool] = lambda path: path.name.startswith("model")
        self.timed: list[str] = []

    def __call__(
        self,
        models: Sequence[Path],
        reference: Path | None,
        settings: RuntimeSettings,
        *,
        reference_nominal_ms: float | None = None,
        **options: Any,
    ) -> list[LatencyRecord]:
        assert reference is not None
        self.timed += [path.name for path in models]
        context = {"provider": settings.provider, "reference": {"now_ms": known_ms(reference)}}
        return [self._record(path, context) for path in models]

    def _record(self, path: Path, context: Json) -> LatencyRecord:
        ms = known_ms(path) * (self.factor if self.slows(path) else 1.0)
        return LatencyRecord(ms, ms, 1.1 * ms, 0.01, 50, 5, 0, 2 * ms, 1.0, sha256_file(path), context)


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> Stopwatch:
    watch = Stopwatch()
    monkeypatch.setattr(run_module, "measure", watch)
    return watch


def latency_yaml(folder: Path, tiers: list[Json], **sections: Any) -> Path:
    """The tiny run on this machine's CPU."""
    profile = {"name": "cpu", "threads": 1, "tiers": tiers}
    values = {**TINY, "profiles": [profile], **sections}
    values["search"] = {**TINY["search"], "calibration": 8}
    values["data"] = {"name": "digits", "limit": 150}
    path = folder / "latency.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_tier_keeps_its_latency_on_the_device_or_is_not_shipped(
    cli: Cli, stopwatch: Stopwatch, tmp_path: Path
) -> None:
    tiers = [{"name": "m", "limits": {"latency": "50 %", "params": "90 %"}}]
    described, root = latency_yaml(tmp_path, tiers), tmp_path / "run"

    stopwatch.factor = 3.0
    outcome = cli("run", described, "--out", root)
    assert outcome.code == 2 and outcome.crash is None
    assert "BudgetMissed: tier cpu/m: latency_ms is" in outcome.err and "not shipped" in outcome.err
    assert not (root / "manifest.json").exists() and not (root / "cpu" / "m" / "measure.json").exists()
    assert "when the machine is idle" in outcome.err, "no network is misjudged by so much"
    chosen = (root / "cpu" / "m" / "arch.json").read_text()
    shipped = [name for name in stopwatch.timed if name.startswith("model")]
    assert shipped == ["model.batch1.onnx"] * 2 * bench.SHIPPED_PROCESSES, "over budget: once more, no more"

    stopwatch.factor = 1.0
    outcome = cli("run", described, "--out", root)
    assert outcome.code == 0, outcome
    assert (root / "cpu" / "m" / "arch.json").read_text() == chosen
    assert not (root / "cpu" / "m" / "misses.json").exists()
    [tier] = manifest_of(root)["tiers"]
    assert tier["answer"] == "cpu/m/model.batch1.onnx"
    assert tier["measured"]["latency_ms"] == known_ms(root / tier["answer"]) <= tier["budgets"]["latency_ms"]
    assert tier["use"]["latency_ms"] > 0.8
    assert tier["predicted"]["latency_ms"] == pytest.approx(tier["measured"]["latency_ms"], rel=0.15)
    reference = manifest_of(root)["costs"]["cpu"]["reference"]
    assert sha256_file(root / reference["path"]) == reference["sha256"]
    assert reference["nominal_ms"] == pytest.approx(known_ms(root / reference["path"]))

    again = len(stopwatch.timed)
    shutil.rmtree(root)
    assert cli("profile", described, "--out", root).code == 0
    assert len(stopwatch.timed) == again, "the cost table comes from the cache"
    run = run_module.open_run(root, None, Silent())
    benches = [run.bench(profile) for profile in run.config.profiles * 2]
    assert len({id(bench.patience) for bench in benches}) == 1, (
        "a device is waited for once, not bench by bench"
    )


def test_another_machine_s_costs_are_not_taken_for_this_one_s(
    cli: Cli, stopwatch: Stopwatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers = [{"name": "m", "limits": {"latency": "50 %"}}]
    root = tmp_path / "run"
    for words in (["profile", latency_yaml(tmp_path, tiers)], ["search"]):
        assert cli(*words, "--out", root).code == 0
    here = run_module.timing_environment()
    for part in ("cpu", "runtime"):
        there = {**here, part: "another one"}
        monkeypatch.setattr(run_module, "timing_environment", lambda there=there: there)
        outcome = cli("run", "--out", root)
        assert outcome.code == 2 and outcome.crash is None, outcome
        message = rf"StaleArtifact: .*cpu\.json: was measured with another {part} \(.*another one"
        assert re.search(message, outcome.err), outcome.err


def test_every_core_is_as_many_as_when_costs_were_measured(
    cli: Cli, stopwatch: Stopwatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`threads: null` in a smaller container: other latencies for the same words."""
    described, root = latency_yaml(tmp_path, [{"name": "m", "limits": {"latency": "50 %"}}]), tmp_path / "run"
    words = yaml.safe_load(described.read_text())
    words["profiles"][0]["threads"] = None
    described.write_text(yaml.safe_dump(words))
    monkeypatch.setattr(device_profile, "usable_cores", lambda: (0, 1, 2, 3, 4, 5, 6, 7))
    for stage in (["profile", described], ["search"]):
        assert cli(*stage, "--out", root).code == 0
    monkeypatch.setattr(device_profile, "usable_cores", lambda: (0, 1))
    outcome = cli("run", "--out", root)
    assert outcome.code == 2 and "was measured with another threads (8) than there is now (2)" in outcome.err


def test_a_disturbed_machine_is_waited_for_before_it_is_profiled(
    cli: Cli, stopwatch: Stopwatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = itertools.count()
    monkeypatch.setenv("BUDGETLINE_CACHE", str(tmp_path / "cache"))  # where nothing was profiled before

    def disturbed_once(*asked: Any, **options: Any) -> list[LatencyRecord]:
        if next(attempts) == 0:
            raise MeasurementError("the machine is too disturbed to time anything")
        return stopwatch(*asked, **options)

    monkeypatch.setattr(run_module, "measure", disturbed_once)
    monkeypatch.setattr(run_module, "Patience", partial(Patience, pause_s=0.0))
    tiers = [{"name": "m", "limits": {"latency": "50 %"}}]
    outcome = cli("profile", latency_yaml(tmp_path, tiers), "--out", tmp_path / "run")
    assert outcome.code == 0 and "too disturbed to time anything; waiting" in outcome.err, outcome
    assert next(attempts) == 2


def test_a_network_that_ships_slower_than_it_was_chosen_for_makes_room_for_another(
    cli: Cli, stopwatch: Stopwatch, tmp_path: Path
) -> None:
    tiers = [{"name": "m", "limits": {"latency": "50 %"}}, {"name": "l", "limits": {"params": "90 %"}}]
    described, root = latency_yaml(tmp_path, tiers), tmp_path / "run"
    stopwatch.factor = 1.06
    outcome = cli("run", described, "--out", root)
    assert outcome.code == 0, outcome
    manifest = manifest_of(root)
    refused, untouched = manifest["tiers"]
    assert 0.8 < refused["use"]["latency_ms"] <= 1
    folder = root / "cpu" / "m"
    [miss] = json.loads((folder / "misses.json").read_text())
    assert miss["shipped_ms"] == pytest.approx(1.06 * miss["timed_ms"], rel=0.01)
    assert miss["shipped_ms"] > refused["budgets"]["latency_ms"]
    assert miss["key"] != json.loads((folder / "arch.json").read_text())["key"]
    assert not (root / "cpu" / "l" / "misses.json").exists() and "latency_ms" not in untouched["budgets"]
    run = run_module.open_run(root, None, Silent())
    assert [found["key"] for found in misses_of(run, run.tiers[0])] == [miss["key"]]
    last_training = json.loads((folder / "train.json").read_text())["seconds"]
    others = json.loads((root / "cpu" / "l" / "train.json").read_text())["seconds"]
    assert manifest["stages"]["retrain"] == pytest.approx(
        last_training + others + miss["seconds"]["retrain"], abs=0.01
    ), "what was given up was paid for"
    assert cli("run", described, "--out", root).code == 0, "done is done"
    shared = json.loads((root / "cpu" / "l" / "train.json").read_text())["sha256"]
    (folder / "misses.json").write_text(json.dumps([miss | {"weights": shared}]))
    assert report_stage(run)["stages"]["retrain"] == pytest.approx(last_training + others, abs=0.01), (
        "but once, where another tier has it still"
    )
    costs = root / "costs" / "cpu.json"
    costs.write_text(costs.read_text() + "\n")
    assert not misses_of(run, run.tiers[0]), "nor does a device that was measured again hold them against it"


def test_what_a_refused_network_taught_is_trained_again(
    cli: Cli, stopwatch: Stopwatch, tmp_path: Path
) -> None:
    tiers = [{"name": name, "limits": {"latency": f"{share} %"}} for name, share in (("m", 40), ("l", 70))]
    recipe = {"epochs": 1, "distil": {"weight": 0.5}}
    described, root = latency_yaml(tmp_path, tiers, retrain=recipe), tmp_path / "run"
    stopwatch.factor, stopwatch.slows = 1.06, lambda path: "l" in path.parts and path.name.startswith("model")
    outcome = cli("run", described, "--out", root)
    assert outcome.code == 0, outcome
    [miss] = json.loads((root / "cpu" / "l" / "misses.json").read_text())
    teacher = json.loads((root / "cpu" / "l" / "arch.json").read_text())["key"]
    taught_by = json.loads((root / "cpu" / "m" / "train.json").read_text())["inputs"]["teacher"]
    assert taught_by == teacher != miss["key"]
    assert "cpu/m: learnt from another network than the largest, so it is trained again" in outcome.err
    assert cli("run", described, "--out", root).code == 0, "done is done"


def test_a_network_that_became_the_largest_is_trained_without_a_teacher(cli: Cli, copied: Path) -> None:
    """And the one that was the largest learns from it. What both had learnt before is made again."""
    rewrite(copied, retrain={"epochs": 1, "distil": {"weight": 0.5}})
    for tier in TIERS:
        (copied / DEVICE / tier / "train.json").unlink()
    assert cli("retrain", "--out", copied).code == 0

    def taught_by(tier: str) -> str:
        found: Json = json.loads((copied / DEVICE / tier / "train.json").read_text())
        return str(found["inputs"]["teacher"])

    def chosen(tier: str) -> Json:
        found: Json = json.loads((copied / DEVICE / tier / "arch.json").read_text())
        return found

    assert (taught_by("s"), taught_by("l")) == (chosen("l")["key"], "none")
    path, small = copied / DEVICE / "s" / "arch.json", chosen("s")
    small["predicted"]["flops"] = 2 * chosen("l")["predicted"]["flops"]
    path.write_text(json.dumps(small))
    outcome = cli("retrain", "--out", copied)
    assert outcome.code == 0 and outcome.err.count("so it is trained again") == 2, outcome
    assert (taught_by("l"), taught_by("s")) == (small["key"], "none")
    before = written(copied)
    assert cli("retrain", "--out", copied).code == 0 and written(copied) == before, "done is done"


def test_the_last_attempt_s_network_is_refused_for_good(
    cli: Cli, stopwatch: Stopwatch, tmp_path: Path
) -> None:
    tiers = [{"name": "m", "limits": {"latency": "50 %"}}]
    once = {**TINY["derive"], "attempts": 1}
    described, root = latency_yaml(tmp_path, tiers, derive=once), tmp_path / "run"
    stopwatch.factor = 1.06
    outcome = cli("run", described, "--out", root)
    assert outcome.code == 2 and outcome.err.strip().splitlines()[-1].startswith("BudgetMissed: "), outcome
    assert f"raise derive.attempts (it is 1) in {root / 'run.yaml'}" in outcome.err
    refused = (root / "cpu" / "m" / "arch.json").read_text()

    asked = yaml.safe_load((root / "run.yaml").read_text())
    asked["derive"]["attempts"] = 2
    (root / "run.yaml").write_text(yaml.safe_dump(asked))
    outcome = cli("measure", "--out", root)
    assert outcome.code == 2 and "NetworkRefused: tier cpu/m" in outcome.err, outcome
    assert cli("run", "--out", root).code == 0
    assert (root / "cpu" / "m" / "arch.json").read_text() != refused


def test_a_whole_run_on_this_machine_s_cpu(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Really measured, with room to spare: it is skipped where the machine is too busy to measure at all."""
    monkeypatch.setattr(run_module, "Patience", partial(Patience, pause_s=0.0))
    tiers = [{"name": "m", "limits": {"latency": "60 %"}}]
    one = {"best": 1, "random": 0, "uniform": 0, "rescored": 4, "samples": 50, "trial_epochs": 0}
    generous = {**one, "low": 0.4, "high": 0.7, "least": 0.3}
    described, root = latency_yaml(tmp_path, tiers, derive=generous), tmp_path / "run"
    outcome = cli("run", described, "--out", root)
    if "MeasurementError" in outcome.err or "BudgetMissed" in outcome.err:
        pytest.skip(f"the machine is too busy to measure: {outcome.err.splitlines()[-1]}")
    assert outcome.code == 0, outcome
    [tier] = manifest_of(root)["tiers"]
    [timed] = [file["latency"] for file in tier["files"] if file["latency"]]
    assert 0 < timed["p50_ms"] <= timed["p95_ms"] and timed["context"]["provider"] == "CPUExecutionProvider"
    assert tier["measured"]["latency_ms"] <= tier["budgets"]["latency_ms"]
    assert cli("verify", root, "--no-remeasure").code == 0
    assert cli("select", root, "--latency-ms", tier["budgets"]["latency_ms"]).code == 0
