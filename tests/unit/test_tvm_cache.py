"""The cache of kernels that TVM compiled."""

from __future__ import annotations

from pathlib import Path

import pytest

from hetcomp.backends import tvm_cache
from hetcomp.backends.protocol import Kernel
from hetcomp.backends.tvm_cache import cached_kernel

_KERNEL = Kernel("k", "source", 64, (("k.o", b"\x7fELF\x00\xff"),))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HETCOMP_CACHE", str(tmp_path))


def _never() -> Kernel:
    raise AssertionError("made again")


def test_a_kernel_is_made_once() -> None:
    assert cached_kernel("k", lambda: _KERNEL) == _KERNEL
    assert cached_kernel("k", _never) == _KERNEL
    with pytest.raises(AssertionError, match="made again"):
        cached_kernel("other", _never)


def test_other_code_around_it_makes_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cached_kernel("k", lambda: _KERNEL)
    monkeypatch.setattr(tvm_cache, "_own_sources", lambda: "changed")
    with pytest.raises(AssertionError, match="made again"):
        cached_kernel("k", _never)


@pytest.mark.parametrize("text", ["", "{", '{"name": "k"}', '{"objects": [["k.o", "%"]], "name": "k", "source": ""}'])
def test_what_is_no_kernel_is_made_again(tmp_path: Path, text: str) -> None:
    cached_kernel("k", lambda: _KERNEL)
    (file,) = (tmp_path / "objects").glob("*.tvm.json")
    file.write_text(text)
    assert cached_kernel("k", lambda: _KERNEL) == _KERNEL
    assert cached_kernel("k", _never) == _KERNEL


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        cached_kernel("k", _never)
    assert not list(tmp_path.rglob("*.tmp"))
