"""What the system says of a machine, read from files like those that it writes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.devices import environment, hardware


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hierarchy of control groups, this process in one of them, on eight cores."""
    (tmp_path / "own").write_text("0::/pod/container\n")
    monkeypatch.setattr(hardware, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(hardware, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    return tmp_path / "cgroup"


def limit(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_without_a_quota_every_core_counts(cgroups: Path) -> None:
    assert hardware.core_quota() is None and len(hardware.usable_cores()) == 8
    limit(cgroups / "pod" / "container", cpu__max="max 100000")
    assert hardware.core_quota() is None and len(hardware.usable_cores()) == 8


@pytest.mark.parametrize(
    ("own", "above", "quota", "cores"),
    [
        ("200000 100000", "max 100000", 2.0, 2),
        ("max 100000", "350000 100000", 3.5, 3),
        ("400000 100000", "150000 100000", 1.5, 1),
        ("50000 100000", "max 100000", 0.5, 1),
        ("1600000 100000", "max 100000", 16.0, 8),
    ],
)
def test_a_container_s_share_is_the_least_of_its_groups(
    cgroups: Path, own: str, above: str, quota: float, cores: int
) -> None:
    limit(cgroups / "pod" / "container", cpu__max=own)
    limit(cgroups / "pod", cpu__max=above)
    assert hardware.core_quota() == quota
    assert hardware.usable_cores() == tuple(range(cores))
    assert len(hardware.quiet_cores(1)) == 1


def test_the_first_version_of_control_groups(cgroups: Path, tmp_path: Path) -> None:
    (tmp_path / "own").write_text("4:memory:/m\n2:cpu,cpuacct:/docker/a\n1:name=systemd:/\n")
    limit(cgroups / "cpu" / "docker" / "a", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert hardware.core_quota() is None
    limit(cgroups / "cpu", cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000")
    assert hardware.core_quota() == 3.0, "a container that sees its own group as the root"


ARM = """processor : {n}
BogoMIPS : 48.00
CPU implementer : 0x41
CPU architecture: 8
CPU variant : 0x{variant}
CPU part : {part}
CPU revision : 1
"""


@pytest.mark.parametrize(
    ("info", "board", "name"),
    [
        ("processor : 0\nmodel name : Example 9000\nstepping : 1\n", "", "Example 9000"),
        (ARM.format(n=0, variant=4, part="0xd0b") + "Model : Raspberry Pi 5\n", "", "Raspberry Pi 5"),
        (
            "".join(ARM.format(n=n, variant=2, part=p) for n, p in enumerate(["0xd05"] * 4 + ["0xd0b"] * 4)),
            "Radxa ROCK 5B\0",
            "Radxa ROCK 5B, 0x41-0xd05-1, 0x41-0xd0b-1",
        ),
        (ARM.format(n=0, variant=1, part="0xd40"), "", "0x41-0xd40-1"),
    ],
)
def test_processors_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, info: str, board: str, name: str
) -> None:
    """Linux on ARM has no name for them: two boards must not be one for that."""
    (tmp_path / "cpuinfo").write_text(info)
    (tmp_path / "board").write_text(board)
    monkeypatch.setattr(hardware, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(hardware, "BOARD", tmp_path / "board")
    assert hardware.cpu_model() == name


def test_which_of_several_kinds_of_gpus_is_meant_is_part_of_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gpus_of(models: tuple[str, ...]) -> object:
        monkeypatch.setattr(environment, "gpu_models", lambda: models)
        return environment.timing_environment()["gpu"]

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert gpus_of(("A", "A")) == ["A", "A"], "any of a kind is as good"
    assert gpus_of(("A", "B")) == ["A", "B", "of which visible: 1"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert gpus_of(("A", "B")) == ["A", "B"]
