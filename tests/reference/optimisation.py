"""Programs and kernels compiled in less time than users' are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hetcomp.backends import native_compiler


@contextmanager
def optimised(flag: str) -> Iterator[None]:
    """Inside, this process compiles with ``flag`` where users get -O3."""
    flags = tuple(flag if each == "-O3" else each for each in native_compiler._FLAGS)
    assert flags != native_compiler._FLAGS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_compiler, "_FLAGS", flags)
        yield
