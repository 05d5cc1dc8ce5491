"""Programs of whole tiny models, compiled in a quarter of the time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.reference.optimisation import optimised


@pytest.fixture(scope="module", autouse=True)
def optimisation() -> Iterator[None]:
    """-O0 where users get -O3, for what is compared here is how kernels work together: alone they are tested with
    optimisation (tests/unit/test_kernels_*), together with users' flags in the demo model and tests/e2e."""
    with optimised("-O0"):
        yield
