"""An image folder too large for memory: start-up, memory over an epoch, throughput beside torchvision's
ImageFolder, and a restart in the middle of an epoch.

Makes a folder of JPEGs (once; it is found again by its size): gradients and noise of many sizes, each
image its own, drawn from seeds by all cores. Then, each in a fresh process so that none inherits
another's memory:

- start: listing and reading every header, once without and once with what is known of the files;
- epoch: one epoch of training batches, with the memory of the process and its workers sampled all along
  (pages that several of them share count once; pages of files that the system keeps are not theirs);
- torchvision: the same epoch by `ImageFolder` and `DataLoader`, with as many workers and the same transforms;
- resume: batches from the middle of the epoch, asked for by a process that begins there.

The two readers take turns, `--rounds` times, and their best rounds are compared: what else the machine
does makes a round slower, never faster. Images are decoded from the files in every step: nothing is kept
(`cache: 0`), as torchvision keeps nothing; how much faster the second epoch is when all is kept
(`--keep`) is measured apart.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from benchmarks.record import (
    Evidence,
    Target,
    at_least,
    at_most,
    markdown_table,
    none_of,
    parser_for,
    run_script,
)
from pipeline.devices.hardware import usable_cores
from pipeline.errors import BudgetlineError
from pipeline.types import Json

NUM_CLASSES = 100
SMALLEST, LARGEST = 64, 256
JPEG_QUALITY = 85
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SAMPLE_SECONDS = 0.25
FLAT = 1.10
"""Largest memory of the second half of the epoch over the largest of its first half."""
STEPS_COMPARED = 8


# ------------------------------------------------------------------------------------------------- the folder


def make_folder(root: Path, num_images: int, seed: int) -> None:
    """`root/class/number.jpg`; does nothing where there already are as many."""
    made = root / "made.json"
    wanted = {"images": num_images, "seed": seed}
    if made.exists() and json.loads(made.read_text()) == wanted:
        return
    for label in range(NUM_CLASSES):
        (root / f"class{label:03}").mkdir(parents=True, exist_ok=True)
    blocks = [range(start, min(start + 500, num_images)) for start in range(0, num_images, 500)]
    with ProcessPoolExecutor(len(usable_cores())) as pool:
        for _ in pool.map(_make_block, [root] * len(blocks), blocks, [seed] * len(blocks)):
            pass
    made.write_text(json.dumps(wanted))


def _make_block(root: Path, numbers: range, seed: int) -> None:
    for number in numbers:
        path = root / f"class{number % NUM_CLASSES:03}" / f"{number:07}.jpg"
        path.write_bytes(synthetic_jpeg(number, seed))


def synthetic_jpeg(number: int, seed: int) -> bytes:
    """A smooth random field of a random size, with some noise: no two are alike."""
    from PIL import Image

    rng = np.random.default_rng([seed, number])
    width, height = rng.integers(SMALLEST, LARGEST + 1, 2).tolist()
    coarse = Image.fromarray(
        rng.integers(0, 256, (rng.integers(3, 9), rng.integers(3, 9), 3), dtype=np.uint8)
    )
    field = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noise = rng.integers(-12, 13, (height, width, 1), dtype=np.int16)
    buffer = io.BytesIO()
    Image.fromarray((field + noise).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


# ---------------------------------------------------------------------------- what is done in fresh processes


def settings_of(asked: Namespace) -> Json:
    return {
        "image_size": asked.size,
        "crop": "resized",
        "memory": 0,
        "cache": asked.cache,
        "workers": asked.workers,
        "architecture_share": 0.02,
        "test_share": 0.02,
    }


def load(asked: Namespace) -> Any:
    from pipeline.data import load_task

    return load_task(f"image-folder:{asked.folder}", seed=0, settings=settings_of(asked))


def batches_of(asked: Namespace) -> Any:
    from pipeline.data.batches import Batches

    return Batches(load(asked), "weights", asked.batch_size, seed=asked.seed, augment=True, drop_last=True)


def do_start(asked: Namespace) -> Json:
    started = time.perf_counter()
    task = load(asked)
    return {"seconds": time.perf_counter() - started, "images": len(task.source.labels)}


def do_epoch(asked: Namespace) -> Json:
    """An epoch here, and the digests of the batches in its middle, where `do_resume` begins."""
    stream = batches_of(asked)
    middle = stream.steps_per_epoch // 2
    stream.at(0)
    digests = []
    with sampled() as samples:
        started = time.perf_counter()
        for step in range(1, stream.steps_per_epoch):
            images, labels = stream.at(step)
            if middle <= step < middle + STEPS_COMPARED:
                digests.append(digest(images, labels))
        seconds = time.perf_counter() - started
    images_read = (stream.steps_per_epoch - 1) * asked.batch_size
    return {**_rates(images_read, seconds, samples), "digests": digests}


def do_resume(asked: Namespace) -> Json:
    stream = batches_of(asked)
    middle = stream.steps_per_epoch // 2
    started = time.perf_counter()
    first = digest(*stream.at(middle))
    seconds = time.perf_counter() - started
    rest = [digest(*stream.at(step)) for step in range(middle + 1, middle + STEPS_COMPARED)]
    return {"digests": [first, *rest][: stream.steps_per_epoch - middle], "first_batch_seconds": seconds}


def do_torchvision(asked: Namespace) -> Json:
    """The same number of images in random order, by torchvision and torch alone."""
    import torch
    from torch.utils.data import DataLoader, Subset
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = [
        transforms.RandomResizedCrop(asked.size),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    whole = ImageFolder(str(asked.folder), transforms.Compose(steps))
    generator = torch.Generator().manual_seed(asked.seed)
    loader = DataLoader(
        Subset(whole, torch.randperm(len(whole), generator=generator)[: asked.images].tolist()),
        asked.batch_size,
        num_workers=asked.workers,
        drop_last=True,
    )
    batches = iter(loader)
    next(batches)
    with sampled() as samples:
        started = time.perf_counter()
        num_images = sum(len(labels) for _, labels in batches)
        seconds = time.perf_counter() - started
    return _rates(num_images, seconds, samples)


PARTS: dict[str, Callable[[Namespace], Json]] = {
    "start": do_start,
    "epoch": do_epoch,
    "resume": do_resume,
    "torchvision": do_torchvision,
}


def digest(images: Any, labels: Any) -> str:
    return hashlib.sha256(images.contiguous().numpy().tobytes() + labels.numpy().tobytes()).hexdigest()


class Samples(NamedTuple):
    """Of this process and its descendants together: MiB in use, and seconds of computing so far."""

    mib: list[float]
    cpu_seconds: list[float]


@contextmanager
def sampled() -> Iterator[Samples]:
    """Four times a second, and at the end."""
    samples, done = Samples([], []), threading.Event()
    before = _used()[1]

    def sample() -> None:
        ended = False
        while not ended:
            ended = done.wait(SAMPLE_SECONDS)
            mib, cpu_seconds = _used()
            samples.mib.append(mib)
            samples.cpu_seconds.append(cpu_seconds - before)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def _used() -> tuple[float, float]:
    """A page that several of them share counts once: each has its part (PSS)."""
    this, mib, cpu_seconds = psutil.Process(), 0.0, 0.0
    for process in [this, *this.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):  # it has just ended
            mib += process.memory_full_info().pss / 2**20
            cpu_seconds += sum(process.cpu_times()[:4])  # and of children that ended
    return mib, cpu_seconds


def _rates(num_images: int, seconds: float, samples: Samples) -> Json:
    return {
        "images_per_second": num_images / seconds,
        "cpu_ms_per_image": 1000 * samples.cpu_seconds[-1] / num_images,
        "memory": samples.mib,
    }


# ----------------------------------------------------------------------------------------------- the evidence


def in_fresh_process(part: str, asked: Namespace) -> Json:
    options = {**vars(asked), "folder": str(asked.folder), "json": str(asked.json)}
    command = [sys.executable, "-m", "benchmarks.image_folder", "--do", part, "--json", "-"]
    child = subprocess.run(
        [*command, "--options", json.dumps(options)],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "BUDGETLINE_CACHE": str(asked.folder.parent / "cache")},
    )
    if child.returncode:
        raise BudgetlineError(
            f"part '{part}' ended with exit code {child.returncode}; its error stands above"
        )
    answer: Json = json.loads(child.stdout.splitlines()[-1])
    return answer


def growth(samples: Sequence[float]) -> float:
    """The most of the second half over the most of the first."""
    half = len(samples) // 2
    return max(samples[half:]) / max(samples[:half]) if half else float("nan")


def main() -> bool:
    asked = arguments()
    if asked.do:
        print(json.dumps(PARTS[asked.do](asked)))
        return True
    evidence = Evidence("image_folder")
    asked.folder.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    make_folder(asked.folder, asked.images, asked.seed)
    made_seconds = time.perf_counter() - started
    asked.cache = 0
    cold, warm = (in_fresh_process("start", asked) for _ in range(2))
    rounds = [
        {part: in_fresh_process(part, asked) for part in ("epoch", "torchvision")}
        for _ in range(asked.rounds)
    ]
    resumed = in_fresh_process("resume", asked)
    ours, theirs = (
        max((each[part] for each in rounds), key=lambda found: found["images_per_second"])
        for part in ("epoch", "torchvision")
    )
    asked.cache = asked.keep
    kept = [in_fresh_process("epoch", asked) for _ in range(2)] if asked.keep else []
    numbers: Json = {
        "images": asked.images,
        "workers": asked.workers,
        "size": asked.size,
        "made_seconds": made_seconds,
        "start": {"cold": cold, "warm": warm},
        "rounds": rounds,
        "resume": resumed,
        "kept": kept,
    }
    ratio = ours["images_per_second"] / theirs["images_per_second"]
    grown = max(growth(each["epoch"]["memory"]) for each in rounds)
    differing = [
        str(number)
        for number, pair in enumerate(zip(ours["digests"], resumed["digests"], strict=True))
        if len(set(pair)) > 1
    ]
    targets: list[Target] = [
        at_least("images per second over torchvision's", ratio, 0.9),
        at_most("memory, second half of the epoch over the first", grown, FLAT),
        none_of("batches that differ after a restart in mid-epoch", differing),
    ]
    return evidence.finish(
        asked.json, seeds=[asked.seed], numbers=numbers, targets=targets, table=_table(numbers, ours, theirs)
    )


def _table(numbers: Json, ours: Json, theirs: Json) -> str:
    start = numbers["start"]
    rows: list[list[object]] = [
        ["start, nothing known", f"{start['cold']['seconds']:.1f} s", ""],
        ["start, headers known", f"{start['warm']['seconds']:.1f} s", ""],
        ["images/s", f"{ours['images_per_second']:.0f}", f"{theirs['images_per_second']:.0f}"],
        ["CPU time per image", *(f"{x['cpu_ms_per_image']:.2f} ms" for x in (ours, theirs))],
        ["most memory, all processes", *(f"{max(x['memory'], default=0):.0f} MiB" for x in (ours, theirs))],
        ["first batch of a restart", f"{numbers['resume']['first_batch_seconds']:.2f} s", ""],
    ]
    for epoch, found in zip(("first", "second"), numbers["kept"], strict=False):
        rows.append(
            [f"images/s, decoded images kept, {epoch} epoch", f"{found['images_per_second']:.0f}", ""]
        )
    return markdown_table(
        [f"{numbers['images']} images, {numbers['workers']} workers", "ours", "torchvision"], rows
    )


def arguments() -> Namespace:
    parser = parser_for(
        "image_folder",
        __doc__,
        "--json out/image_folder.json --folder out/images --images 100000 --keep '8 GiB'",
    )
    parser.add_argument("--folder", type=Path, help="where the images are made, or lie already")
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--size", type=int, default=64, help="pixels that networks get")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=len(usable_cores()))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", default="", help="two more epochs with decoded images kept, up to this")
    parser.add_argument("--do", choices=PARTS, help="one part, as the others start it")
    parser.add_argument("--options", help="that part's arguments as JSON")
    asked = parser.parse_args()
    if asked.do:
        return Namespace(**{**json.loads(asked.options), "do": asked.do})
    if asked.folder is None:
        parser.error("--folder is missing")
    return asked


if __name__ == "__main__":
    run_script(main)
