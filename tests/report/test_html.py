from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sample_run import sample_records, trace

from pipeline.report.html import count_text, duration, flat, percent, render_report
from pipeline.report.manifest import build_manifest
from pipeline.types import Json


class Page(HTMLParser):
    """Text, links and the balance of tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag not in {"meta", "br", "link"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def page(original_manifest: Json) -> str:
    return render_report(original_manifest, trace())


def test_page_is_well_formed_and_needs_nothing_else(page: str) -> None:
    parsed = Page(page)
    assert parsed.open == []
    assert not parsed.tags & {"script", "link", "img", "iframe", "object"}
    assert "@import" not in page and "url(http" not in page
    assert {link for link in parsed.links if "://" in link} == set()


def test_with_several_devices_the_command_says_which(original_manifest: Json) -> None:
    manifest = copy.deepcopy(original_manifest)
    manifest["tiers"][1]["device"] = "pi"
    manifest["profiles"]["pi"] = manifest["profiles"]["cpu-1thread"]
    manifest["costs"]["pi"] = manifest["costs"]["cpu-1thread"]
    text = Page(render_report(manifest)).text
    assert "budgetline select . --device cpu-1thread --latency-ms 0.15 --params 500000" in text


def test_a_tier_has_one_colour_on_the_page(original_manifest: Json) -> None:
    """Also where tiers are listed from the largest to the smallest, and traced so, and where the one with the
    most parameters is the fastest."""
    original_manifest = copy.deepcopy(original_manifest)
    small, *_, large = original_manifest["tiers"]
    small["params"], large["params"] = large["params"], small["params"]
    listed = {**original_manifest, "tiers": original_manifest["tiers"][::-1]}
    traced = [{**record, "tiers": record.get("tiers", [])[::-1]} for record in trace()]

    def colours_of(page: str) -> dict[str, set[str]]:
        dots = re.findall(r'class="dot" style="background: (#\w+)"></span>(\w+)<', page)
        ends = re.findall(r"<text[^>]*fill: color-mix\(in oklab, (#\w+) [^>]*>(\w+)</text>", page)
        found: dict[str, set[str]] = {}
        for colour, name in (*dots, *ends):
            found.setdefault(name, set()).add(colour)
        return {name: colours for name, colours in found.items() if name in set("SML")}

    found = colours_of(render_report(listed, traced))
    assert set(found) == set("SML") and all(len(colours) == 1 for colours in found.values()), found
    assert found == colours_of(render_report(original_manifest, trace()))


def test_links_are_relative_files_of_the_run(page: str, run: Path) -> None:
    files = {link for link in Page(page).links if not link.startswith("#")} - {"manifest.json"}
    assert len(files) == 12
    assert all((run / name).is_file() for name in files)


def test_text_is_escaped(page: str) -> None:
    assert "fashion &lt;demo&gt;" in page and "<demo>" not in page


def test_table_shows_every_tier(page: str) -> None:
    text = Page(page).text
    for words in (
        "0.15 ms",
        "0.146 ms",
        "0.155 ms",
        "97.3 %",
        "62.4 k",
        "3.21 M",
        "244 KiB",
        "90.30 %",
        "90.71 %",
    ):
        assert words in text, words
    assert "3 networks for cpu-1thread from one search on fashion-mnist, each within its budget." in text


def test_report_tells_the_run(page: str) -> None:
    text = Page(page).text
    for words in (
        "2024-05-06 07:08:09 UTC",
        "is 0.71",
        "budgetline verify .",
        "budgetline select . --latency-ms 0.15 --params 500000",
        "Example CPU",
        "30 min 08 s",
        "predictor over 30 measured networks",
    ):
        assert words in text, words
    assert page.count("<svg ") == 4 + 4 + 1


def test_same_manifest_same_page(manifest: Json) -> None:
    assert render_report(manifest, trace()) == render_report(manifest, trace())


def test_parts_that_a_run_may_lack(tmp_path: Path) -> None:
    records = sample_records(tmp_path)
    del records["search"]["ranking"]
    records["profiles"]["cpu-1thread"]["provider"] = "none"
    for tier in records["tiers"]:
        for values in ("measured", "budgets", "use", "predicted"):
            del tier[values]["latency_ms"]
        tier["files"][1]["latency"] = None
    page = render_report(build_manifest(**records))
    assert Page(page).open == []
    assert "How latency was measured" not in page and "ranking be trusted" not in page
    assert page.count("<svg ") == 3


def test_several_devices_attacks_and_a_ranking_that_fails(tmp_path: Path) -> None:
    records = sample_records(tmp_path)
    records["profiles"]["pi"] = records["profiles"]["cpu-1thread"]
    records["tiers"].append({**records["tiers"][0], "device": "pi"})
    measured = {"steps": 10, "step_size": 0.5 / 255, "images": 1000, "clean": 0.9125}
    records["tiers"][0]["accuracy"]["attacks"] = [
        {"attack": "fgsm", "epsilon": 2 / 255, "accuracy": 0.5},
        {"attack": "pgd", "epsilon": 0.5 / 255, "accuracy": 0.4375, **measured},
    ]
    records["search"]["ranking"] |= {"spearman": None, "trusted": False, "points": []}
    text = Page(render_report(build_manifest(**records))).text
    assert "The family for cpu-1thread" in text and "The family for pi" in text
    assert "S fgsm 2/255 — — — 50.00 %" in text
    assert "S pgd 0.5/255 10 1 000 91.25 % 43.75 %" in text
    assert "Not on its own" in text and "not defined" in text


def test_values_for_people() -> None:
    assert percent(0.98125) == "98.12 %"
    assert [duration(s) for s in (4.24, 59.97, 192, 3600 * 1 + 305)] == [
        "4.2 s",
        "1 min 00 s",
        "3 min 12 s",
        "1 h 05 min",
    ]
    assert count_text(50_000) == "50\u202f000" and count_text(2.34e10) == "2.3 × 10^10"
    assert flat({"a": {"b": True, "c": [1, 2]}, "d": [{"e": None}], "f": 0.1234567}) == [
        ("a.b", "yes"),
        ("a.c", "1, 2"),
        ("d.0.e", "—"),
        ("f", "0.123457"),
    ]


def test_dark_and_print_styles_are_there(page: str) -> None:
    assert re.search(r"@media screen and \(prefers-color-scheme: dark\)", page)
    assert "@media print" in page
