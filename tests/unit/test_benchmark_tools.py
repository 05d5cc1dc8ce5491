"""What the benchmarks are built from: records, worker processes, accuracy measures."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest

from benchmarks.quality import evaluate
from benchmarks.record import FORMAT, Record
from benchmarks.worker import Worker


def test_record_has_what_a_judge_needs(tmp_path):
    record = Record("example", {"threads": 2}, plan_sha256="ab" * 32, versions={"peer": "1.2"})
    for sample in (3.0, 1.0, 2.5):
        record.add("ours decode", "tok/s", sample)
        record.add("time", "s", sample, higher_is_better=False)
    record.derived["ratio"] = 1.5
    data = json.loads(record.write(tmp_path).read_text())
    assert data["format"] == FORMAT == "hetcomp-bench/1"
    assert data["machine"]["cores"] >= 1 and data["machine"]["cpu"] and len(data["commit"]["id"]) >= 7
    assert data["command"] and data["plan_sha256"] == "ab" * 32 and data["versions"] == {"peer": "1.2"}
    by_name = {series["name"]: series for series in data["series"]}
    assert by_name["ours decode"]["samples"] == [3.0, 1.0, 2.5]
    assert (by_name["ours decode"]["median"], by_name["ours decode"]["best"]) == (2.5, 3.0)
    assert by_name["time"]["best"] == 1.0
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_worker_answers_reports_errors_and_its_end():
    with Worker(sys.executable, "worker_example") as worker:
        assert worker.call("double", value=21) == 42
        with pytest.raises(RuntimeError, match=r"ValueError: odd"):
            worker.call("fail")
        assert worker.call("double", value=1) == 2
        with pytest.raises(RuntimeError, match="ended with status 3"):
            worker.call("leave")


def test_accuracy_of_known_distributions():
    """Two engines over two tokens: one always 1/2 : 1/2, one always 3/4 : 1/4."""
    even = np.log(np.array([[0.5, 0.5]] * 4, dtype=np.float32))
    skewed = np.log(np.array([[0.75, 0.25]] * 4, dtype=np.float32)) + 7  # logits need not be normalised
    result = evaluate({"even": lambda ids: even, "skewed": lambda ids: skewed}, "even", [[0, 0, 1, 0]])
    assert result["even"].perplexity == pytest.approx(2.0)
    np.testing.assert_array_equal(result["even"].divergence, 0)
    assert result["skewed"].perplexity == pytest.approx(math.exp(-(2 * math.log(0.75) + math.log(0.25)) / 3))
    divergence = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    np.testing.assert_allclose(result["skewed"].divergence, [divergence] * 3, rtol=1e-6)
    assert result["skewed"].same_top.all()
