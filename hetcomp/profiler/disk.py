"""Speed of the disk that models are read from."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import tempfile
import time
from pathlib import Path

from hetcomp.errors import HetcompError
from hetcomp.hardware.figures import Disk, Source

FILE_BYTES = 512 << 20
_BLOCK = 8 << 20
_PARTS = 4  # readings of one pass over the file
_LEAST_FREE = 2 << 30


def measure_disk(folder: Path) -> tuple[Disk, tuple[float, ...]]:
    """Sequential read, past the page cache, of a file of 512 MiB that is written to ``folder`` for this and removed.

    Returns the figure and its readings (GB/s of every quarter). Raises HetcompError with less than 2 GiB free, and
    where O_DIRECT is not possible: a cached read would say nothing.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < _LEAST_FREE:
            raise HetcompError(f"The disk of {folder} was not measured: less than 2 GiB are free.")
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".disk-") as file:
            block = os.urandom(_BLOCK)
            for _ in range(FILE_BYTES // _BLOCK):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            seconds = _read(Path(file.name))
    except OSError as error:
        raise HetcompError(f"The disk of {folder} was not measured: {error.strerror or error}.") from None
    rates = tuple(FILE_BYTES / _PARTS / s / 1e9 for s in seconds)
    return Disk(path=str(folder), gb_per_s=FILE_BYTES / sum(seconds) / 1e9, source=Source.MEASURED), rates


def _read(path: Path) -> list[float]:
    """Seconds of each part. Raises OSError where O_DIRECT is not possible."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
    seconds = []
    try:
        with contextlib.closing(mmap.mmap(-1, _BLOCK)) as buffer:  # page-aligned, as O_DIRECT wants
            for _ in range(_PARTS):
                start = time.perf_counter()
                for _ in range(FILE_BYTES // _PARTS // _BLOCK):
                    if os.readv(handle, [buffer]) != _BLOCK:
                        raise OSError("the file was read short")
                seconds.append(time.perf_counter() - start)
    finally:
        os.close(handle)
    return seconds
