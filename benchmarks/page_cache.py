"""What of files the system keeps in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def leave_page_cache(files: Iterable[Path]) -> None:
    """Has the files read from the disk when they are read next. Raises OSError."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
