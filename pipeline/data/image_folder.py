"""Any folder of class folders, maybe below train/ and test/ (or val/), decoded by Pillow.

With train/ and test/, those are the splits, and a val/ beside them is the architecture split; with
train/ and val/ alone, val/ is the test split; otherwise a stratified test split is drawn. Alpha is
dropped; 16-bit grey keeps its upper eight bits; the EXIF orientation is applied; an animation gives its
first frame. Files are taken in sorted order, so the same files give the same task.

A folder whose decoded images go into `memory` is decoded once and held there. A larger one is streamed:
processes decode what is asked for, ahead of its turn, and keep what goes into `cache` on disk. Either
way a step has the same images. The fingerprint of images in memory is over their pixels; of streamed
ones over names, sizes and beginnings of files (`listing.listing_digest` says what that detects).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ByteSize, Field

from pipeline.artifacts import read_json, sha256_json, write_json
from pipeline.data import listing
from pipeline.data.arrays import ArrayImages, Padding, Share, TaskSettings, build_task, channel_statistics
from pipeline.data.base import ImageTask, Split
from pipeline.data.cache import cache_folder, reserve_rows
from pipeline.data.decode import Attempts, Decoder, attempt
from pipeline.data.listing import Files, Headers, Scan
from pipeline.data.splits import SPLIT_SEED, split_images
from pipeline.data.streamed import StreamedImages, processes
from pipeline.devices.hardware import usable_cores
from pipeline.errors import ConfigError, DataError
from pipeline.types import IntArray, Json, Progress

_MEMORY_SHARE = 0.5
_MOST_WORKERS = 16
_STATISTICS_IMAGES = 10_000
_SPLITS: tuple[Split, ...] = ("weights", "architecture", "test")


class ImageFolderSettings(TaskSettings):
    architecture_share: Share = 0.2
    test_share: Share = 0.2
    image_size: int | None = Field(
        None, ge=8, le=1024, description="pixels; resize the shorter side to it, then cut the centre square"
    )
    crop: Literal["padded", "resized"] = Field(
        "padded",
        description="training crops: of the padded square; or of 8 to 100 % of the file's own area, resized, "
        "as is usual at 224 pixels (evaluation then cuts the middle 7/8)",
    )
    crop_padding: Padding | None = Field(None, description="pixels; an eighth of the image size unless given")
    memory: ByteSize = Field(ByteSize(2 * 2**30), description="decoded images up to this are held in memory")
    cache: ByteSize = Field(
        ByteSize(8 * 2**30), description="decoded images of streamed folders up to this are kept on disk"
    )
    workers: int | None = Field(
        None, ge=1, le=256, description="processes that decode streamed images; one a core unless given"
    )


def load(
    path: Path | None, settings: ImageFolderSettings, *, name: str, seed: int, progress: Progress
) -> ImageTask:
    """Only the files of the three splits are opened, so `limit` also shortens decoding."""
    if path is None:
        raise ConfigError(f"data '{name}': an image folder needs its path; write image-folder:PATH")
    scan = listing.scan(path)
    _refuse_settings_without_effect(settings, scan.given, path)
    if scan.num_ignored:
        progress.say(f"{path}: ignored {scan.num_ignored} files that are not images")
    splits = split_images(
        scan.labels,
        scan.classes,
        scan.given,
        test_share=settings.test_share,
        architecture_share=settings.architecture_share,
        limit=settings.limit,
        seed=seed,
        where=str(path),
    )
    used = np.sort(np.concatenate(list(splits.values())))
    folder = _Folder(path, settings, scan, used, splits, progress)
    return folder.in_memory(name) if folder.fits_in_memory else folder.streamed(name)


def _refuse_settings_without_effect(
    settings: ImageFolderSettings, given: Mapping[Split, IntArray], path: Path
) -> None:
    shares: dict[Split, str] = {"test": "test_share", "architecture": "architecture_share"}
    for split, field in shares.items():
        if split in given and field in settings.model_fields_set:
            raise ConfigError(
                f"{path}: has its own folder for the {split} split, so '{field}' has no effect; remove it"
            )
    if settings.crop == "resized" and settings.crop_padding is not None:
        raise ConfigError(
            f"{path}: 'crop_padding' has no effect with 'crop: resized', which pads nothing; remove it"
        )


class _Folder:
    """The files of the three splits, and what their headers say."""

    def __init__(
        self,
        root: Path,
        settings: ImageFolderSettings,
        scan: Scan,
        used: IntArray,
        splits: Mapping[Split, IntArray],
        progress: Progress,
    ) -> None:
        self.root, self.settings, self.progress = root, settings, progress
        self.classes, self.labels = scan.classes, scan.labels[used]
        self.files: Files = scan.files.take(used)
        self.splits = {split: np.searchsorted(used, indices) for split, indices in splits.items()}
        self.workers = settings.workers or min(_MOST_WORKERS, len(usable_cores()))
        self.work = cache_folder() / "image-folders"
        known = self.work / f"{sha256_json(str(root.resolve()))[:16]}.npz"
        self.headers: Headers = listing.headers_of(
            root, self.files, known, partial(processes, self.workers), progress
        )
        size = settings.image_size or _common_size(self.headers, root)
        channels = 1 if self.headers.grey_N.all() else 3
        self.decoder = Decoder(size, channels, original=settings.crop == "resized")
        self.bytes_N = self.decoder.kept_bytes(self.headers.area_N)

    @property
    def fits_in_memory(self) -> bool:
        """Crops that are resized are made from files, or from the cache, whatever memory there is."""
        return not self.decoder.original and int(self.bytes_N.sum()) <= self.settings.memory

    @property
    def crop_padding(self) -> int:
        given = self.settings.crop_padding
        return self.decoder.size // 8 if given is None else given

    @property
    def statistics_of(self) -> IntArray:
        """The weights split, or as many of it as say the same; whether it is in memory or not."""
        weights = self.splits["weights"]
        if len(weights) <= _STATISTICS_IMAGES:
            return weights
        chosen = np.random.default_rng(SPLIT_SEED).permutation(weights)[:_STATISTICS_IMAGES]
        return np.sort(chosen)

    # ------------------------------------------------------------------------------------------- in memory

    def in_memory(self, name: str) -> ImageTask:
        idle = sorted({"cache", "workers"} & self.settings.model_fields_set)
        if idle:
            self.progress.say(
                f"{self.root}: the decoded images go into memory, so {' and '.join(idle)} have no effect"
            )
        _refuse_too_large(int(self.bytes_N.sum()), len(self.labels), self.root)
        pixels = np.empty((len(self.labels), *self.decoder.shape), np.uint8)
        files = [self.root / name for name in self.files.names]
        position = {file: index for index, file in enumerate(files)}

        def decode(file: Path) -> None:
            pixels[position[file]] = self.decoder.whole(file)

        def decode_block(block: Sequence[Path]) -> Attempts[None]:
            return attempt(decode, zip(block, block, strict=True))

        listing.each_in_threads(decode_block, files, self.root, "decoding images", self.progress)
        return build_task(
            name,
            self.classes,
            ArrayImages(pixels, self.labels),
            self.splits,
            flip=self.settings.flip,
            preparation=self.decoder.preparation,
            crop_padding=self.crop_padding,
            statistics_of=self.statistics_of,
        )

    # -------------------------------------------------------------------------------------------- streamed

    def streamed(self, name: str) -> ImageTask:
        fingerprint = self._fingerprint()
        order = np.concatenate([self.splits[split] for split in _SPLITS])
        rows = reserve_rows(self.work, fingerprint[:16], self.bytes_N, order, self.settings.cache)
        kept = 0 if rows is None else int((rows.offset_N >= 0).sum())
        self.progress.say(
            f"{self.root}: {len(self.labels)} images are decoded as they are needed, by {self.workers} "
            f"processes; {kept} of them are kept in {self.work}"
        )
        source = StreamedImages(
            self.root, self.files.names, self.labels, self.decoder, workers=self.workers, rows=rows
        )
        mean, std = self._statistics(source, self.work / f"{fingerprint[:16]}.json")
        return ImageTask(
            name=name,
            classes=self.classes,
            source=source,
            splits=self.splits,
            mean=mean,
            std=std,
            flip=self.settings.flip,
            crop_padding=0 if self.decoder.original else self.crop_padding,
            fingerprint=fingerprint,
            resized_crop=self.decoder.original,
            preparation=self.decoder.preparation,
        )

    def _fingerprint(self) -> str:
        """sha256 over the files (`listing_digest`), classes, labels, splits, and how images are
        decoded."""
        made: Json = {
            "files": listing.listing_digest(self.files, self.headers),
            "classes": self.classes,
            "decoder": [*self.decoder.shape, self.decoder.original],
        }
        digest = hashlib.sha256(json.dumps(made).encode())
        for array in (self.labels, *(self.splits[split] for split in _SPLITS)):
            digest.update(f"{len(array)}:".encode())
            digest.update(np.ascontiguousarray(array, dtype="<i8").data)
        return digest.hexdigest()

    def _statistics(self, source: StreamedImages, known: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel, worked out once and kept in `known`."""
        if not known.exists():
            self.progress.say(f"{self.root}: mean and deviation of {len(self.statistics_of)} images")
            mean, std = channel_statistics(source, self.statistics_of)
            write_json(known, {"mean": mean.tolist(), "std": std.tolist()})
        kept = read_json(known)
        return tuple(kept["mean"]), tuple(kept["std"])


def _common_size(headers: Headers, root: Path) -> int:
    sizes = Counter(zip(headers.width_N.tolist(), headers.height_N.tolist(), strict=True))
    (width, height), count = min(sizes.items(), key=lambda item: (-item[1], item[0]))
    assert isinstance(width, int)
    if len(sizes) > 1:
        raise DataError(
            f"{root}: images have {len(sizes)} different sizes (most often {width}×{height}, {count} of "
            f"{len(headers.width_N)}); set data.image_size (--set data.image_size=64) to resize and cut them "
            "all to one square"
        )
    if width != height:
        raise DataError(
            f"{root}: images are {width}×{height}, but networks take squares; set data.image_size "
            "(--set data.image_size=64) to resize and cut them"
        )
    return width


def _refuse_too_large(num_bytes: int, num_images: int, root: Path) -> None:
    import psutil

    available = psutil.virtual_memory().available
    if num_bytes > _MEMORY_SHARE * available:
        raise DataError(
            f"{root}: {num_images} decoded images are held in memory, {num_bytes / 2**30:.1f} GiB, more "
            f"than half of the {available / 2**30:.1f} GiB available; set data.memory to less to have them "
            "streamed, or a smaller image_size, or a limit"
        )
