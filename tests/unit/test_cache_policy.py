"""The policies of the expert cache as the planner replays them: the same as the runtime's."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hetcomp.passes.cache_policy import HALF_LIFE, LRU_MARGIN, CachedShape, CachePolicy

# Read by runtime_lib/tests/test_cache_policy_cases.cpp too; running this file makes it anew.
CASES = Path(__file__).resolve().parents[1] / "data" / "cache_policies.json"


def replayed(case: dict[str, Any]) -> list[dict[str, Any]]:
    """By step: the arrivals before it, and in each layer the choices that found their expert."""
    shapes = [CachedShape(experts, size) for experts, size in case["layers"]]
    policy = CachePolicy(case["rule"], shapes, case["slots"], case["bytes_per_step"])
    for layer, shape in enumerate(shapes):
        for expert in range(min(case["first"], case["slots"], shape.experts)):
            policy.place(layer, expert, expert)
    found = []
    for step in case["steps"]:
        ids = np.array(step["ids"]).reshape(len(shapes), -1, case["top_k"])
        arrivals = policy.choose() if step["decode"] else []
        policy.begin_step(step["tokens"], step["decode"])
        policy.count(ids)
        hits = [int(policy.held[layer][ids[layer]].sum()) for layer in range(len(shapes))]
        policy.arrived()
        found.append({"arrivals": [[a.layer, a.expert, a.slot] for a in arrivals], "hits": hits})
    return found


def test_the_cases_that_the_runtime_is_held_to_are_these():
    for case in json.loads(CASES.read_text()):
        assert replayed(case) == case["found"]


def decode(policy: CachePolicy, *experts: int) -> int:
    """A step of one token of one layer; how many experts came before it."""
    came = policy.choose()
    policy.begin_step(1, True)
    policy.count(np.array(experts)[None, None])
    policy.arrived()
    return len(came)


def test_lru_exchanges_only_what_was_used_long_before():
    policy = CachePolicy("lru", [CachedShape(4, 1)], 1, 10)
    policy.place(0, 0, 0)
    decode(policy, 0)
    assert [decode(policy, 1) for _ in range(int(LRU_MARGIN))] == [0] * int(LRU_MARGIN)
    assert decode(policy, 1) == 1 and policy.held[0].tolist() == [False, True, False, False]


def test_lfu_forgets_with_its_half_life():
    policy = CachePolicy("lfu", [CachedShape(4, 1)], 1, 10)
    policy.place(0, 0, 0)
    for _ in range(40):
        decode(policy, 0)
    came = [decode(policy, 1) for _ in range(60)]
    # 40 uses of 0 lose less than a sixth in 60 ticks: n uses of 1 must be more than 1.25 times as many and one.
    assert came.index(1) > 40 * 2 ** (-60 / HALF_LIFE) and sum(came) == 1


def test_an_expert_of_more_bytes_than_a_step_comes_after_several():
    policy = CachePolicy("lfu", [CachedShape(4, 25)], 1, 10)
    assert [decode(policy, 0) for _ in range(4)] == [0, 0, 1, 0]


@pytest.mark.parametrize("rule", ["lru", "lfu"])
def test_choices_that_stay_the_same_end_in_slots(rule):
    policy = CachePolicy(rule, [CachedShape(16, 1), CachedShape(8, 1)], 4, 100)
    for _ in range(3):
        policy.choose()
        policy.begin_step(1, True)
        policy.count(np.array([[[9, 3, 12]], [[7, 0, 1]]]))
        policy.arrived()
    assert policy.held[0, [9, 3, 12]].all() and policy.held[1, [7, 0, 1]].all()


def random_case(draw: random.Random) -> dict[str, Any]:
    """Routing that stays for a while, of two layers of different sizes."""
    top_k = draw.randint(1, 3)
    layers = [[draw.randint(5, 14), draw.choice([10, 25])] for _ in range(draw.randint(1, 3))]
    slots = draw.randint(top_k, 6)
    hot = [draw.sample(range(experts), experts) for experts, _ in layers]
    steps = []
    for _ in range(draw.randint(20, 60)):
        tokens = draw.choice([1, 1, 1, 1, 2, 5])
        if draw.random() < 0.1:
            hot = [draw.sample(order, len(order)) for order in hot]
        ids = []
        for order in hot:
            chosen: list[int] = []
            for _ in range(tokens):
                weights = [1 / (rank + 1) for rank in range(len(order))]
                token: list[int] = []
                while len(token) < top_k:
                    token += [e for e in draw.choices(order, weights) if e not in token]
                chosen += token
            ids.append(chosen)
        steps.append({"decode": tokens < 5, "tokens": tokens, "ids": ids})
    return {
        "rule": draw.choice(["lru", "lfu"]),
        "layers": layers,
        "top_k": top_k,
        "slots": slots,
        "first": draw.randint(0, slots),
        "bytes_per_step": draw.choice([5, 20, 60, 1000]),
        "steps": steps,
    }


def write_cases() -> None:
    """Random cases, and one that goes on until units of uses start anew."""
    draw = random.Random(1)
    cases = [random_case(draw) for _ in range(40)]
    long = {"rule": "lfu", "layers": [[6, 10]], "top_k": 1, "slots": 2, "first": 2, "bytes_per_step": 10}
    prompt = {"decode": False, "tokens": 70_000, "ids": [[4]]}
    steps = [{"decode": True, "tokens": 1, "ids": [[n % 5]]} for n in range(40)]
    cases.append({**long, "steps": [*steps, prompt, *steps, prompt, *steps]})
    CASES.write_text(json.dumps([{**case, "found": replayed(case)} for case in cases], separators=(",", ":")) + "\n")


if __name__ == "__main__":
    write_cases()
