"""What this machine is made of, asked of the operating system alone (standard library, Python >= 3.9)."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

CPU_FOLDER = Path("/sys/devices/system/cpu")
CPU_INFO = Path("/proc/cpuinfo")
BOARD = Path("/proc/device-tree/model")
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
_WATCH_SECONDS = 0.2


def usable_cores() -> tuple[int, ...]:
    """As many of the cores this process may run on as it may keep busy, in ascending order: a container's
    share of processor time may be that of fewer."""
    cores, quota = _allowed_cores(), core_quota()
    return cores if quota is None else cores[: max(1, int(quota))]


def _allowed_cores() -> tuple[int, ...]:
    """The cores this process may run on, in ascending order (all of them where the system cannot say)."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def core_quota() -> float | None:
    """Cores' worth of processor time that this process' control group is given (`docker run --cpus`, a
    Kubernetes limit); None where it is not limited. The least of all groups above it counts."""
    quotas = [_quota(folder) for folder in _cgroup_folders()]
    return min((quota for quota in quotas if quota is not None), default=None)


def _cgroup_folders() -> list[Path]:
    """Of this process' groups and all above them, in version 2 and version 1 of the hierarchy."""
    folders: list[Path] = []
    for line in _read(OWN_CGROUP).splitlines() or ["0::/"]:
        number, controllers, own = (*line.split(":", 2), "", "")[:3]
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        root = CGROUPS if number == "0" else CGROUPS / "cpu"
        inner = root / own.lstrip("/")
        folders += [inner, *(parent for parent in inner.parents if parent.is_relative_to(root))]
    return folders


def _quota(folder: Path) -> float | None:
    text = _read(folder / "cpu.max").split()
    if not text:
        text = [_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
    try:
        share, period = map(float, text)
    except ValueError:  # not there, or max
        return None
    return share / period if share > 0 and period > 0 else None


def quiet_cores(count: int) -> tuple[int, ...]:
    """`count` of the usable cores to measure on: the fastest kind first, one thread per physical core before
    its siblings, then the ones that do least at this moment."""
    cores = _allowed_cores()
    if count >= len(cores):
        return cores
    busy = _busy_seconds(cores)
    best = sorted(cores, key=lambda core: (-_speed(core), _is_sibling(core, cores), busy[core]))
    return tuple(sorted(best[:count]))


def _speed(core: int) -> int:
    """Relative speed of a core where kinds differ (big and little ones); equal numbers where they do not."""
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        text = _read(CPU_FOLDER / f"cpu{core}" / name)
        if text.isdigit():
            return int(text)
    return 0


def _is_sibling(core: int, cores: Sequence[int]) -> bool:
    """Whether a lower-numbered usable core is the same physical one."""
    text = _read(CPU_FOLDER / f"cpu{core}" / "topology" / "thread_siblings_list")
    return any(other < core for other in _numbers(text) if other in cores)


def _numbers(text: str) -> list[int]:
    """`0,4-6` → [0, 4, 5, 6]."""
    found: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found.extend(range(int(first), int(last or first) + 1))
    return found


def _busy_seconds(cores: Sequence[int]) -> dict[int, float]:
    """How long each core worked for others over the next 0.2 s; zeros where the system does not say."""
    before = _busy_ticks()
    if not before:
        return dict.fromkeys(cores, 0.0)
    time.sleep(_WATCH_SECONDS)
    after = _busy_ticks()
    tick = 1 / os.sysconf("SC_CLK_TCK")
    return {core: (after.get(core, 0) - before.get(core, 0)) * tick for core in cores}


def _busy_ticks() -> dict[int, int]:
    """Per core, clock ticks not spent idle (columns 4 and 5 of /proc/stat are idle and waiting for input)."""
    rows = [line.split() for line in _read(Path("/proc/stat")).splitlines() if line.startswith("cpu")]
    return {
        int(name[3:]): sum(int(x) for x in ticks) - int(ticks[3]) - int(ticks[4])
        for name, *ticks in rows
        if name[3:].isdigit()
    }


def cpu_model() -> str:
    """The processor's name, as precise as the system gives it; on ARM, whose Linux has none, the board and
    the kinds of cores by number."""
    told: dict[str, list[str]] = {}
    for line in _read(CPU_INFO).splitlines():
        key, _, value = line.partition(":")
        told.setdefault(key.strip(), []).append(value.strip())
    for key in ("model name", "Model", "Hardware"):
        if key in told:
            return told[key][0]
    numbers = (told.get(f"CPU {key}", []) for key in ("implementer", "part", "revision"))
    kinds = map(lambda *of_core: "-".join(of_core), *numbers)
    parts = [_read(BOARD).rstrip("\0"), *dict.fromkeys(kinds)]
    if sys.platform == "darwin":
        parts.append(_asked("sysctl", "-n", "machdep.cpu.brand_string"))
    return ", ".join(filter(None, parts)) or platform.processor() or platform.machine()


def gpu_models() -> tuple[str, ...]:
    """Names of the NVIDIA GPUs, by nvidia-smi; empty when there is none or it does not answer in 5 s."""
    answer = _asked("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    return tuple(line.strip() for line in answer.splitlines() if line.strip())


def _asked(*words: str) -> str:
    """What a program answers within 5 s; empty where it does not."""
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip()


def load_average() -> float | None:
    """Runnable processes over the last minute; None where the system does not count them."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def resident_bytes() -> int | None:
    """Memory of this process that is really there, after what its allocator held in reserve was given back;
    None where the system does not say."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc alone has it
    except (AttributeError, OSError, TypeError):
        pass
    pages = _read(Path("/proc/self/statm")).split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if len(pages) > 1 else None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
