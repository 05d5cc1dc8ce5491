"""What the studies of prefetch count: recall of early routing, copies ahead of a cache, and their time."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.disk_prefetch import LayerReads, PageCache, Speeds, reads_of
from benchmarks.disk_prefetch import step_us as disk_step_us
from benchmarks.early_routing import recall
from benchmarks.expert_prefetch import Costs, copy_ahead, held_by, step_us
from hetcomp.progress import QuietProgress

# Two tokens, two layers, two of four experts; the second layer's are named early, best first.
CHOSEN = np.array([[[0, 1], [2, 3]], [[1, 2], [0, 3]]], np.int32)
NAMED = np.array([[[2, 0, 1, 3]], [[1, 3, 0, 2]]], np.int32)


def test_recall_counts_choices_among_the_first_named():
    assert recall(CHOSEN[:, 1:], NAMED, 2).tolist() == [0.5]
    assert recall(CHOSEN[:, 1:], NAMED, 3).tolist() == [0.75]
    assert recall(CHOSEN[:, 1:], NAMED, 4).tolist() == [1.0]


def test_copies_ahead_are_the_first_named_that_are_in_no_slot():
    held = np.zeros((2, 2, 4), np.bool_)
    held[:, :, 1:3] = True  # experts 1 and 2
    one, two = (copy_ahead(held, CHOSEN, NAMED, ahead) for ahead in (1, 2))
    assert one.missing.tolist() == two.missing.tolist() == [[1, 1], [0, 2]]
    assert one.copied.tolist() == [[0, 1], [0, 1]] and one.right.tolist() == [[0, 0], [0, 1]]  # 0 is wrong, 3 right
    assert two.copied.tolist() == [[0, 2], [0, 2]] and two.right.tolist() == [[0, 1], [0, 2]]
    assert not copy_ahead(held, CHOSEN, NAMED, 0).copied.any()


def test_the_policy_holds_what_is_used_and_copies_of_the_chosen_are_all_right():
    chosen = np.random.default_rng(3).permuted(np.tile(np.arange(8, dtype=np.int32), (60, 3, 1)), axis=2)[..., :2]
    held = held_by("lfu", chosen, 8, 3, 2, QuietProgress())
    assert held.shape == (60, 3, 8) and held.sum(axis=2).max() == 3
    found = copy_ahead(held, chosen, chosen[:, 1:], 2)
    assert (found.right == found.copied).all() and (found.right[:, 1:] == found.missing[:, 1:]).all()
    assert found.missing[:, 1:].any() and not found.copied[:, 0].any()


def test_time_of_the_layers():
    costs = Costs(expert=20.0, copy=50.0, meet=6.0, layer=60.0, ahead=10.0, slowdown=1.25)
    none = np.zeros((1, 2), np.int64)
    assert step_us(np.array([[1, 2]]), none, costs) == pytest.approx(60 + 26 + 60 + 46)
    # The first layer's 26 us take 32.5 beside a copy of 50, which is there in time.
    assert step_us(np.array([[1, 1]]), np.array([[0, 1]]), costs) == pytest.approx(60 + 32.5 + 60 + 26 + 10)
    # Two copies are there 7.5 us after everything else.
    assert step_us(np.array([[1, 0]]), np.array([[0, 2]]), costs) == pytest.approx(100 + 60 + 10)


def test_a_step_through_the_page_cache():
    cache = PageCache(3)
    assert reads_of(cache, [[0, 1], [2, 3]], [[2]]) == (LayerReads(2, 0, ()), LayerReads(1, 1, (0,)))
    # What is read ahead drops expert 2 of the layer, which was asked for longest ago.
    assert reads_of(cache, [[1], [0]], [[0, 3]]) == (LayerReads(0, 0, ()), LayerReads(0, 1, (0,)))
    assert cache.ask(1, [2]) == [2] and cache.ask(0, [1]) == [1]


def test_reads_ahead_go_on_under_experts_and_attention():
    speeds = Speeds(dense=10.0, experts=20.0, read=50.0, router=1.0)
    plain = (LayerReads(1, 0, ()), LayerReads(1, 0, ()))
    assert disk_step_us(plain, speeds) == pytest.approx(11 + 50 + 20 + 10 + 50 + 20)
    # Read behind the first layer's own, from 61 to 111, which is 20 behind the second's attention.
    assert disk_step_us((LayerReads(1, 0, ()), LayerReads(0, 1, (0,))), speeds) == pytest.approx(111 + 20)
    # One that was wrong is read first.
    assert disk_step_us((LayerReads(1, 0, ()), LayerReads(1, 1, ())), speeds) == pytest.approx(111 + 50 + 20)
