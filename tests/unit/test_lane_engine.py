"""Tasks on lanes that share the memory and links: times by hand, and what holds of any tasks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetcomp.passes.lane_engine import Task, run_lanes
from hetcomp.passes.memory_contention import copies_slowdown, reads_slowdown

JOINT = 146.0


def cpu(us: float, gb_per_s: float = 0.0, after: tuple[int, ...] = (), lane: str = "cpu:0") -> Task:
    return Task("op", 0, lane, us, after, gb_per_s)


def copy(us: float, gb_per_s: float = 55.0, lane: str = "gpu:0 copy weights", link: str = "gpu:0") -> Task:
    return Task("op", 0, lane, us, (), gb_per_s, link=link)


def test_tasks_wait_for_their_lane_and_for_what_they_read():
    run = run_lanes([cpu(10), cpu(5, lane="gpu:0"), cpu(1, after=(1,)), cpu(2, after=(0, 2), lane="gpu:0")], JOINT)
    assert run.start == (0, 0, 10, 11)
    assert run.end == (10, 5, 11, 13)
    assert run.critical() == [0, 2, 3]


def test_reads_beyond_the_memorys_rate_get_their_part_of_it():
    run = run_lanes([cpu(100, 146), cpu(100, 146, lane="cpu:1"), cpu(150, lane="gpu:0")], JOINT)
    assert run.end == pytest.approx((200, 200, 150))


def test_reads_and_copies_slow_each_other_down_while_both_run():
    run = run_lanes([cpu(1000, 37), copy(200)], JOINT)
    reads, copies = reads_slowdown(37, 55, JOINT), copies_slowdown(37, 55, JOINT)
    assert 1.05 < reads < 1.15
    assert run.end == pytest.approx((1000 + 200 * copies * (1 - 1 / reads), 200 * copies))
    # What reads no memory is not slowed down, and alone nothing is.
    assert run_lanes([cpu(1000), copy(200)], JOINT).end == pytest.approx((1000, 200))


def test_copies_over_one_link_have_equal_parts_of_it():
    activations = "gpu:0 copy in"
    assert run_lanes([copy(100), copy(30, 0.0, activations)], JOINT).end == pytest.approx((130, 60))
    assert run_lanes([copy(100), copy(30, 0.0, activations, "gpu:1")], JOINT).end == pytest.approx((100, 30))


@st.composite
def any_tasks(draw: st.DrawFn) -> list[Task]:
    tasks: list[Task] = []
    for i in range(draw(st.integers(1, 12))):
        after = tuple(draw(st.sets(st.integers(0, i - 1), max_size=2))) if i else ()
        link = draw(st.sampled_from(("", "", "gpu:0", "gpu:1")))
        lane = f"{link} copies" if link else draw(st.sampled_from(("cpu:0", "cpu:1", "gpu:0")))
        tasks.append(Task("op", None, lane, draw(st.floats(1e-3, 1e3)), after, draw(st.floats(0, 80)), link=link))
    return tasks


@given(any_tasks())
def test_nothing_is_faster_than_alone_or_before_what_it_waits_for(tasks):
    run = run_lanes(tasks, 60.0)
    for i, task in enumerate(tasks):
        assert run.end[i] - run.start[i] >= task.us - 1e-9 * run.total_us
        before = [j for j in range(i) if tasks[j].lane == task.lane or j in task.after]
        assert run.start[i] >= max((run.end[j] for j in before), default=0.0)
        assert run.start[i] == (run.end[run.waited_for[i]] if run.waited_for[i] is not None else 0.0)
    assert run.total_us == pytest.approx(run.end[run.critical()[-1]])
