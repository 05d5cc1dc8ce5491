"""Bytes of files that are read once: what the page cache has from there, the rest past it.

A checkpoint is larger than what memory has left for a page cache. Read through it, every byte is copied once more, out
of pages that have to be found first, and the artifact's own pages have to go for them (docs/decisions/compile-time.md).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
import weakref
from pathlib import Path

import numpy as np
import numpy.typing as npt

_LIBC = ctypes.CDLL(None)
_PAGE = mmap.PAGESIZE
# Memory that lies ready to be used again: that of the matrix being packed and of the one read ahead, in two parts each.
# What was read whole and is larger than pieces are (hetcomp.row_pieces) goes back to the system.
_KEPT, _LARGEST_KEPT = 4, 80 << 20


class _Memory:
    """Page-aligned buffers. New ones cost a cleared page for every one that is read into."""

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> npt.NDArray[np.uint8]:
        """``size`` bytes, which go back when nothing refers to the array or a view of it any more."""
        with self._lock:
            fitting = [memory for memory in self._free if size <= len(memory) <= 2 * size]
            memory = min(fitting, key=len) if fitting else mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if fitting:
                self._free.remove(memory)
        # Views of an array refer to what it was made of, not to the array: so it is that whose end counts.
        lent = (ctypes.c_uint8 * size).from_buffer(memory)
        weakref.finalize(lent, self._give_back, memory).atexit = False
        return np.frombuffer(memoryview(lent), dtype=np.uint8)

    def _give_back(self, memory: mmap.mmap) -> None:
        if len(memory) > _LARGEST_KEPT:
            return
        with self._lock:
            self._free.append(memory)
            del self._free[:-_KEPT]


_MEMORY = _Memory()


def read_bytes(path: Path, offset: int, size: int) -> npt.NDArray[np.uint8]:
    """``size`` bytes from ``offset`` on, fewer where the file ends before. Raises OSError."""
    if size == 0:
        return np.empty(0, np.uint8)
    begin = offset // _PAGE * _PAGE
    memory = _MEMORY.take(-(-(offset + size - begin) // _PAGE) * _PAGE)
    with path.open("rb", buffering=0) as file:
        handle = file.fileno()
        end = min(begin + memory.size, os.fstat(handle).st_size)
        have = 0 if _in_page_cache(handle, begin, end) else _read_past_cache(path, memory.data, begin)
        have = _read(handle, memory.data, begin, have)
    return memory[offset - begin : max(offset - begin, min(offset + size - begin, have))]


def _in_page_cache(handle: int, begin: int, end: int) -> bool:
    """Whether reading from there needs no disk. For files that others own the kernel does not say: then True."""
    if end <= begin:
        return True
    pages = (ctypes.c_ubyte * -(-(end - begin) // _PAGE))()
    with contextlib.closing(mmap.mmap(handle, end - begin, mmap.MAP_SHARED, mmap.PROT_READ, offset=begin)) as mapped:
        address = np.frombuffer(mapped, dtype=np.uint8).ctypes.data
        failed = _LIBC.mincore(ctypes.c_void_p(address), ctypes.c_size_t(end - begin), pages)
    return bool(failed) or all(page & 1 for page in pages)


def _read_past_cache(path: Path, view: memoryview, begin: int) -> int:
    """Bytes read; 0 where that is not possible: in a file system in memory, on a disk whose blocks are larger than a
    page. A disk's error comes again, where it is reported."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return 0
    try:
        return _read(handle, view, begin, 0)
    except OSError:
        return 0
    finally:
        os.close(handle)


def _read(handle: int, view: memoryview, begin: int, have: int) -> int:
    """Bytes in ``view`` after all that the file has for it is read, ``have`` of which were there."""
    while have < len(view):
        read = os.preadv(handle, [view[have:]], begin + have)
        have += read
        # Past the cache nothing can follow the file's end, and no read begins within a page.
        if not read or have % _PAGE:
            break
    return have
