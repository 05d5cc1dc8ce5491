"""Candidates for sampling: all tokens from a bound on, what the rows' totals are, and where none are given."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from hetcomp.backends.gpu.candidates import CANDIDATE_WORDS, candidates
from tests.reference.kernel_harness import Step
from tests.reference.triton_harness import run

SEGMENTS, PLACES, HEADER = 32, 64, 4
# runtime_lib/src/candidates.h; the interpreter's exponential is numpy's.
TOTAL_ERROR = 2e-5


@dataclass
class Row:
    """A row of the buffer as the runtime reads it; ``found`` is logit by id, None where there are no candidates."""

    found: dict[int, float] | None
    least: float
    total: float

    @staticmethod
    def of(words: npt.NDArray[np.int32]) -> Row:
        used, counts = words[0], words[HEADER : HEADER + SEGMENTS]
        logits = words[HEADER + SEGMENTS :][: SEGMENTS * PLACES].view(np.float32).reshape(SEGMENTS, PLACES)
        ids = words[HEADER + SEGMENTS + SEGMENTS * PLACES :].reshape(SEGMENTS, PLACES)
        found: dict[int, float] | None = None
        if used >= 0 and (counts[:used] <= PLACES).all():
            found = {int(ids[s, i]): float(logits[s, i]) for s in range(used) for i in range(counts[s])}
        return Row(found, float(words[1:2].view(np.float32)[0]), float(words[2:3].view(np.float32)[0]))


def find(logits: npt.NDArray[np.float32], inverse: list[float]) -> tuple[npt.NDArray[np.int32], list[Row]]:
    rows, vocab = logits.shape
    step = Step(inverse_temperatures=np.array(inverse, np.float32))
    outputs = [((rows,), np.int32), ((rows, CANDIDATE_WORDS), np.int32)]
    best, words = run(candidates(vocab, rows), [logits], outputs, rows=rows, step=step)
    return best, [Row.of(row) for row in words]


def check(row: Row, logits: npt.NDArray[np.float32], inverse: float) -> None:
    assert row.found is not None
    assert row.found == {int(i): float(logits[i]) for i in np.flatnonzero(logits >= row.least)}
    weights = np.exp((logits.astype(np.float64) - logits.max()) * inverse)
    assert row.total == pytest.approx(weights.sum(), rel=TOTAL_ERROR / 4)


@pytest.mark.parametrize("vocab", [2048, 4099, 32000, 151936, 262144])
def test_every_token_from_the_bound_on(vocab):
    numbers = np.random.default_rng(vocab)
    logits = (numbers.standard_normal((2, vocab)) * 3).astype(np.float32)
    best, rows = find(logits, [1.0, 1 / 0.6])
    np.testing.assert_array_equal(best, logits.argmax(axis=-1))
    for row, its, inverse in zip(rows, logits, (1.0, 1 / 0.6), strict=True):
        check(row, its, inverse)
        assert row.found is not None and min(256, vocab // 32) <= len(row.found) <= 600


def test_ties_and_signs():
    numbers = np.random.default_rng(1)
    few_values = numbers.integers(-9, 9, (1, 20000)).astype(np.float32)
    negative = -np.abs(numbers.standard_normal((1, 20000)).astype(np.float32)) - 1
    zeros = np.where(numbers.random((1, 20000)) < 0.02, np.float32(-0.0), np.float32(-5.0))
    for logits in (negative, zeros):
        check(find(logits, [2.0])[1][0], logits[0], 2.0)
    # More tokens than have a place are no candidates.
    assert find(few_values, [1.0])[1][0].found is None


def test_masked_tokens_are_no_candidates_and_few_others_give_none():
    logits = np.random.default_rng(2).standard_normal((2, 20000)).astype(np.float32)
    logits[0, ::3] = -np.inf
    logits[1, 5:] = -np.inf
    best, rows = find(logits, [1.0, 1.0])
    check(rows[0], logits[0], 1.0)
    assert rows[1].found is None and best[1] == logits[1].argmax()


def test_rows_without_a_temperature_or_that_are_not_finite_have_none():
    logits = np.random.default_rng(3).standard_normal((4, 5000)).astype(np.float32)
    logits[1, 77], logits[2, 78] = np.nan, np.inf
    best, rows = find(logits, [0.0, 1.0, 1.0, 1.0])
    assert [row.found is None for row in rows] == [True, True, True, False]
    assert list(best[:3]) == [logits[0].argmax(), -1, -1]
    check(rows[3], logits[3], 1.0)
