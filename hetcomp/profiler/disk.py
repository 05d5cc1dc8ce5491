"""Speed of the disk that models are read from."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import tempfile
import time
from pathlib import Path

from hetcomp.hardware.figures import Disk, Source

FILE_BYTES = 512 << 20
_BLOCK = 8 << 20
_LEAST_FREE = 2 << 30


def measure_disk(folder: Path) -> Disk | None:
    """Sequential read of a file of 512 MiB written to ``folder`` for this, past the page cache (O_DIRECT; where its
    file system does not know it, None: a cached read would say nothing). None too with less than 2 GiB free."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < _LEAST_FREE:
            return None
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".disk-") as file:
            block = os.urandom(_BLOCK)
            for _ in range(FILE_BYTES // _BLOCK):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return Disk(path=str(folder), gb_per_s=_read(Path(file.name)) / 1e9, source=Source.MEASURED)
    except OSError:
        return None


def _read(path: Path) -> float:
    """Bytes a second. Raises OSError where O_DIRECT is not possible."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with contextlib.closing(mmap.mmap(-1, _BLOCK)) as buffer:  # page-aligned, as O_DIRECT wants
            start, total = time.perf_counter(), 0
            while got := os.readv(handle, [buffer]):
                total += got
            return total / (time.perf_counter() - start)
    finally:
        os.close(handle)
