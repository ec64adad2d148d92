"""Download by torchvision, checked against a published md5; nothing half-done stays in the data folder."""

from __future__ import annotations

import contextlib
import errno
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import DataError, StorageError


@contextlib.contextmanager
def downloaded(url: str, md5: str, root: Path, advice: str) -> Iterator[Path]:
    """A checked copy of `url` in a temporary folder under `root`, for the block to move or unpack.

    Raises DataError that ends with `advice` when there is no network or the file is not the published one,
    StorageError when the disk is full."""
    from torchvision.datasets.utils import download_url

    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as folder:
            target = Path(folder) / url.rsplit("/", 1)[-1]
            try:
                download_url(url, folder, target.name, md5)
            except (OSError, RuntimeError) as failure:
                if isinstance(failure, OSError) and failure.errno == errno.ENOSPC:
                    raise
                raise DataError(f"{url}: cannot be downloaded ({failure}); {advice}") from None
            yield target
    except OSError as failure:
        reason = "no space left on the disk" if failure.errno == errno.ENOSPC else failure.strerror or failure
        raise StorageError(
            f"{root}: cannot be written ({reason}); free some space, or name another folder"
        ) from None
