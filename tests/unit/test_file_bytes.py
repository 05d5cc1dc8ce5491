"""Bytes of a checkpoint's files, in and out of the page cache."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetcomp.frontend import file_bytes
from hetcomp.frontend.file_bytes import read_bytes

_SIZE = 3 * 4096 + 77
_DATA = np.random.default_rng(0).integers(0, 256, _SIZE, dtype=np.uint8)


def _file(folder: Path, cached: bool) -> Path:
    path = folder / f"data{cached}"
    _DATA.tofile(path)
    if not cached:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    return path


@pytest.fixture(scope="module", params=[True, False], ids=["cached", "on disk"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose pages are in the page cache, or were not when it was made."""
    return _file(tmp_path_factory.mktemp("bytes"), request.param)


@given(st.integers(0, _SIZE + 5000), st.integers(0, _SIZE + 5000))
@settings(max_examples=200, deadline=None)
def test_any_range_is_what_the_file_has_there(path: Path, offset: int, size: int) -> None:
    assert np.array_equal(read_bytes(path, offset, size), _DATA[offset : offset + size])


def test_where_the_cache_cannot_be_gone_past_it_is_read_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def no_direct(path: str, flags: int, *more: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return opened(path, flags, *more)

    monkeypatch.setattr(file_bytes.os, "open", no_direct)
    assert np.array_equal(read_bytes(_file(tmp_path, False), 5, _SIZE), _DATA[5:])


def test_memory_is_used_again_only_when_no_view_of_it_is_left(path: Path) -> None:
    kept = [read_bytes(path, offset, 5000)[100:300].view(np.uint16) for offset in range(0, 4000, 500)]
    for _ in range(20):
        read_bytes(path, 4096, 6000)
    for number, view in enumerate(kept):
        begin = 500 * number + 100
        assert np.array_equal(view, _DATA[begin : begin + 200].view(np.uint16))


def test_memory_that_lies_ready_is_bounded(path: Path) -> None:
    everything = [read_bytes(path, 0, 4096) for _ in range(20)]
    del everything
    assert len(file_bytes._MEMORY._free) <= file_bytes._KEPT


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "none", 0, 10)
