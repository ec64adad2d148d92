"""One image file: what its header says, and its pixels as the networks get them.

Alpha is dropped; 16-bit grey keeps its upper eight bits; the EXIF orientation is applied; an animation
gives its first frame. Pillow alone: worker processes load this module and no torch.

Two forms are kept of an image (`Decoder.original`). `square`: its shorter side resized, the centre cut,
at the size that networks get. `original`: all its pixels, for crops that are resized anew in every step,
as GoogLeNet was trained (Szegedy et al. 2014, arXiv 1409.4842): a box of 8 to 100 % of the area and a
ratio of 3:4 to 4:3, resized to the square. Boxes, roundings and the evaluation's cut are those of
torchvision's `RandomResizedCrop`, `Resize` and `CenterCrop`, except that the random numbers are given.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.data.cache import Place, read_row, write_row
from pipeline.errors import DataError, StorageError
from pipeline.types import FloatArray

if TYPE_CHECKING:
    from PIL import Image

    PilImage = Image.Image

_GREY_MODES = {"1", "L", "LA", "La"}
_NAMED_AT_MOST = 5
_HEAD_BYTES = 4096

CROP_ATTEMPTS = 10
CROP_DRAWS = (CROP_ATTEMPTS, 4)
"""Shape of the numbers in 0..1 that decide one image's crop: per attempt area, ratio, top and left."""
_LEAST_AREA, _NARROWEST, _WIDEST = 0.08, 3 / 4, 4 / 3
_EVALUATED_SHARE = 0.875  # of the resized shorter side, as 224 of 256

A = TypeVar("A")
T = TypeVar("T")


# ------------------------------------------------------------------------------------------------------ files


class Header(NamedTuple):
    """Width and height in pixels as stored, whether there is no colour, and a hash of the file's first
    4 KiB."""

    width: int
    height: int
    grey: bool
    head: int


def read_header(file: Path) -> Header:
    from PIL import Image

    with file.open("rb") as stream:
        head = hashlib.blake2b(stream.read(_HEAD_BYTES), digest_size=8).digest()
        with Image.open(stream) as image:
            if image.mode == "F":
                raise ValueError("floating-point pixels have no known range")
            grey = image.mode in _GREY_MODES or image.mode.startswith("I")
            return Header(*image.size, grey, int.from_bytes(head, "little"))


class Fault(NamedTuple):
    """A file that cannot be read, and why."""

    file: Path
    reason: str


@dataclass(frozen=True)
class Attempts(Generic[T]):
    """What came of some files, in order, and which of them cannot be read."""

    results: list[T]
    faults: list[Fault]


def attempt(work: Callable[[A], T], items: Iterable[tuple[Path, A]]) -> Attempts[T]:
    """Pillow's decoders raise errors of many kinds on damaged files; only lack of memory, and of space
    for what is kept of them, is not damage."""
    from PIL import UnidentifiedImageError

    results, faults = [], []
    for file, item in items:
        try:
            results.append(work(item))
        except (MemoryError, StorageError):
            raise
        except UnidentifiedImageError:
            faults.append(Fault(file, "not an image"))
        except Exception as failure:
            faults.append(Fault(file, str(failure).partition("\n")[0] or type(failure).__name__))
    return Attempts(results, faults)


def read_headers(files: Sequence[Path]) -> Attempts[Header]:
    return attempt(read_header, zip(files, files, strict=True))


def refuse(faults: Sequence[Fault], num_files: int, root: Path) -> None:
    """Raises DataError where there is a fault."""
    if faults:
        named = [f"{fault.file.relative_to(root)} ({fault.reason})" for fault in faults]
        raise DataError(
            f"{root}: {len(faults)} of {num_files} images cannot be read: {some(named)}; repair or remove "
            "them"
        )


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


# ----------------------------------------------------------------------------------------------------- pixels


class Request(NamedTuple):
    """An image that is wanted: its file, where its decoded form may be kept, and the numbers that decide
    its crop (shape `CROP_DRAWS`), or None for the whole image."""

    file: Path
    place: Place | None
    crop: FloatArray | None


@dataclass(frozen=True)
class Decoder:
    """Makes squares of `size` pixels with `channels` (1 or 3) out of files."""

    size: int
    channels: int
    original: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.size, self.size, self.channels

    @property
    def preparation(self) -> str:
        """How a file becomes the square that a network is evaluated on, in words."""
        size = f"{self.size} × {self.size}"
        cut = (
            f"shorter side resized to {_resized_side(self.size)} pixels, the centre {size} cut"
            if self.original
            else f"the largest centred square resized to {size}"
        )
        return f"EXIF orientation applied, transparency dropped; {cut}; bilinear with antialiasing (Pillow)"

    def kept_bytes(self, areas: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bytes of the form that is kept, for images of these areas in pixels."""
        return self.channels * (areas if self.original else np.full(len(areas), self.size**2))

    def whole(self, file: Path) -> NDArray[np.uint8]:
        """The whole image at `shape`."""
        return self.cut(self.decoded(file), None)

    def answer(self, request: Request) -> NDArray[np.uint8]:
        """From where it is kept, or from the file, and then kept."""
        if request.place is None:
            return self.cut(self.decoded(request.file), request.crop)
        kept = read_row(request.place, self.channels)
        if kept is None:
            kept = self.decoded(request.file)
            write_row(request.place, kept)
        return self.cut(kept, request.crop)

    def decoded(self, file: Path) -> NDArray[np.uint8]:
        """The form that is kept, shape (H, W, C)."""
        from PIL import Image, ImageOps

        with Image.open(file) as image:
            if not self.original:  # a JPEG that is much larger is decoded at a fraction of its size
                image.draft(None, (self.size, self.size))
            upright = _eight_bit(ImageOps.exif_transpose(image), "L" if self.channels == 1 else "RGB")
        if not self.original and upright.size != (self.size, self.size):
            upright = ImageOps.fit(upright, (self.size, self.size), Image.Resampling.BILINEAR)
        return np.asarray(upright).reshape(upright.height, upright.width, self.channels)

    def cut(self, kept: NDArray[np.uint8], crop: FloatArray | None) -> NDArray[np.uint8]:
        """A kept form at `shape`: whole for evaluation, or the crop that the numbers say."""
        if not self.original:
            assert crop is None, "squares are kept without what a crop would be taken from"
            return kept
        from PIL import Image

        image = Image.fromarray(kept[:, :, 0] if self.channels == 1 else kept)
        if crop is None:
            image = _centre(image, self.size)
        else:
            box = crop_box(crop, image.width, image.height)
            image = image.crop(box).resize((self.size, self.size), Image.Resampling.BILINEAR)
        return np.asarray(image).reshape(self.shape)


def answer_all(decoder: Decoder, requests: Sequence[Request]) -> NDArray[np.uint8]:
    """Shape (N, H, W, C). Raises DataError that names what cannot be read."""
    attempts = attempt(decoder.answer, [(request.file, request) for request in requests])
    if attempts.faults:
        file, reason = attempts.faults[0]
        raise DataError(f"{file}: cannot be read ({reason}); repair or remove it, and run again")
    return np.stack(attempts.results)


def crop_box(draws: FloatArray, width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the first attempt that fits into the image; the largest centred box
    of an allowed ratio where none does."""
    for area_draw, ratio_draw, top_draw, left_draw in draws.tolist():
        area = width * height * (_LEAST_AREA + (1 - _LEAST_AREA) * area_draw)
        ratio = math.exp(math.log(_NARROWEST) + math.log(_WIDEST / _NARROWEST) * ratio_draw)
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(left_draw * (width - wide + 1)), int(top_draw * (height - high + 1))
            return left, top, left + wide, top + high
    wide, high = min(width, round(height * _WIDEST)), min(height, round(width / _NARROWEST))
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high


def _centre(image: PilImage, size: int) -> PilImage:
    from PIL import Image

    shorter, wanted = min(image.size), _resized_side(size)
    width, height = (wanted if side == shorter else int(wanted * side / shorter) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))


def _resized_side(size: int) -> int:
    return round(size / _EVALUATED_SHARE)


def _eight_bit(image: PilImage, mode: str) -> PilImage:
    from PIL import Image

    if image.mode.startswith("I"):
        values: NDArray[Any] = np.asarray(image).clip(0, 2**16 - 1)
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)
