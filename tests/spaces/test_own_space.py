"""A space in a file of the user's own: found, refused with a reason, and known again by what stands in it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_run import Cli

from pipeline.errors import ConfigError, StaleArtifact
from pipeline.progress import Silent
from pipeline.run import open_run
from pipeline.spaces import space_entry

PLAIN = Path(__file__).with_name("plain_space.py")
PARAMS = Path(__file__).parents[2] / "profiles" / "params.yaml"


HEAD = """
from pipeline.settings import Settings
from pipeline.spaces import SpaceEntry
class Own(Settings):
    {field}: str = "x"
class Space:
    __slots__ = ()
    def fingerprint(self): return {{}}
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"there is no such file in .*; wanted a Python file with SPACE in it"),
        ("x = 1", r"wanted SPACE = SpaceEntry\(settings, make\) in it, found nothing of that name"),
        ("SPACE = 3", r"in it, found int"),
        ("import nowhere_to_be_found", r"cannot be loaded \(ModuleNotFoundError: No module named"),
        ("def f(:", r"cannot be loaded \(SyntaxError"),
        ("import neighbour", r"imports neighbour.py beside it; put all of a space into one file"),
        (
            HEAD.format(field="x") + "SPACE = SpaceEntry(dict, Space)",
            "wanted a class made from pipeline.settings",
        ),
        (HEAD.format(field="name") + "SPACE = SpaceEntry(Own, Space)", "has a setting 'name'"),
        (HEAD.format(field="x") + "SPACE = SpaceEntry(Own, lambda *asked: Space())", "has __slots__"),
    ],
)
def test_what_is_no_space_is_refused(
    text: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time it is asked for, not only the first."""
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "mine.py"
    (tmp_path / "neighbour.py").write_text("")
    if text is not None:
        path.write_text(text)
    for _ in range(2):
        with pytest.raises(ConfigError, match=message):
            entry = space_entry(f"file:{path}")
            entry.make((3, 8, 8), 4, entry.settings())


def test_its_fingerprint_follows_its_text(tmp_path: Path) -> None:
    def fingerprint(path: Path) -> object:
        entry = space_entry(f"file:{path}")
        return entry.make((3, 8, 8), 4, entry.settings()).fingerprint()

    here, there = PLAIN, tmp_path / "other_name.py"
    shutil.copy(here, there)
    assert fingerprint(here) == fingerprint(there)
    there.write_text(PLAIN.read_text() + "\n# changed\n")
    assert fingerprint(here) != fingerprint(there)


def test_a_run_of_a_space_that_was_changed_is_stale(cli: Cli, tmp_path: Path) -> None:
    path, out = tmp_path / "mine.py", tmp_path / "run"
    shutil.copy(PLAIN, path)
    words = [
        "profile",
        "--profile",
        PARAMS,
        "--space",
        f"file:{path}",
        "--set",
        "space.channels=4",
        "--out",
        out,
    ]
    assert cli(*words).code == 0
    assert cli(*words).code == 0, "the same once more"
    path.write_text(path.read_text().replace("(1, 2, 4)", "(1, 2, 5)"))
    changed = cli(*words)
    assert changed.code == 2 and "was made from another space than there is now" in changed.err


def test_its_settings_are_checked_and_its_errors_name_the_run(cli: Cli, tmp_path: Path) -> None:
    words = ["profile", "--profile", PARAMS, "--space", f"file:{PLAIN}", "--out", tmp_path / "run"]
    unknown = cli(*words, "--set", "space.width=4")
    assert (
        unknown.code == 2 and "command line: space: unknown key 'width'; valid keys: channels" in unknown.err
    )
    missing = cli(*words[:3], "--space", "file:nowhere.py", "--out", tmp_path / "run")
    assert missing.err.startswith("ConfigError: command line: space 'file:nowhere.py': there is no such file")


def test_a_worker_that_finds_another_text_refuses_its_first_job(cli: Cli, tmp_path: Path) -> None:
    path, out = tmp_path / "mine.py", tmp_path / "run"
    shutil.copy(PLAIN, path)
    words = ["profile", "--profile", PARAMS, "--space", f"file:{path}", "--out", out]
    assert cli(*words).code == 0
    open_run(out, None, Silent()).require_same_space()
    path.write_text(path.read_text().replace("(1, 2, 4)", "(1, 2, 5)"))
    with pytest.raises(StaleArtifact, match="another space"):
        open_run(out, None, Silent()).require_same_space()
