"""Programs of whole tiny models, compiled in a quarter of the time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hetcomp.backends import native_compiler


@pytest.fixture(scope="module", autouse=True)
def optimisation() -> Iterator[None]:
    """-O0 where users get -O3, for what is compared here is how kernels work together: alone they are tested with
    users' flags (tests/unit/test_kernels_*), together with them in the demo model and tests/e2e."""
    flags = tuple("-O0" if flag == "-O3" else flag for flag in native_compiler._FLAGS)
    assert flags != native_compiler._FLAGS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_compiler, "_FLAGS", flags)
        yield
