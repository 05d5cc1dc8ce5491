"""Plans drawn at random, compiled and run on the emulated GPU through random steps, against transformers in float32.

tests/reference/random_plans.py says what is drawn. Each row of logits must be that of transformers, of tokens that
defer that of deferral's definition, whatever came before: prompts and batches in any order, sequences that are cut and
fed again. A seed, the number in a test's id, draws the same plan and steps again: `-k 7-gpt_oss`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from hetcomp.errors import HetcompError
from hetcomp.executable import Executable
from hetcomp.ir.deferral import MoeLayer, moe_layers
from hetcomp.ir.homes import CPU, memory_of
from hetcomp.ir.step_rows import decode_rows
from hetcomp.record_routing import recorded_steps
from hetcomp.routing_trace import RoutedStep
from hetcomp.runtime import Session
from tests.parity.test_families import TOLERANCE, relative_error
from tests.reference.deferral_reference import deferred_logits
from tests.reference.emulated_gpu import emulated_gpu
from tests.reference.random_plans import CONTEXT, RandomPlan, draw
from tests.reference.tiny_models import save_tiny

STEPS = 8
# Deferral; what is refused; a cache on two GPUs beside two nodes; streams alone on two GPUs. Each family.
QUICK = (6, 8, 12, 22)
PLANS = [
    pytest.param(plan, marks=[] if plan.seed in QUICK else pytest.mark.exhaustive, id=str(plan))
    for plan in map(draw, range(24))
]


@dataclass
class Sequence:
    """A session, what it was fed, which of that deferred, the logits that came back, and how it was routed, by place:
    experts int [layers that tell their routing, top_k]."""

    session: Session
    ids: list[int] = field(default_factory=list)
    deferred: set[int] = field(default_factory=set)
    rows: dict[int, np.ndarray] = field(default_factory=dict)
    routed: dict[int, np.ndarray] = field(default_factory=dict)

    def cut(self, length: int) -> None:
        self.session.truncate(length)
        del self.ids[length:]
        self.deferred -= {place for place in self.deferred if place >= length}
        for found in (self.rows, self.routed):
            for place in [place for place in found if place >= length]:
                del found[place]


@dataclass
class Run:
    """Random steps of a model, and what they add up to: experts of CPU memory that steps of prompts chose in layers
    that may stream them (``wanted``) and how many such there were (``most_copied``), choices of tokens that a graph of
    decoding ran in layers with a cache, and tokens fed."""

    model: PreTrainedModel
    exe: Executable
    random: Random
    steps: list[RoutedStep]
    live: list[Sequence] = field(default_factory=list)
    deferral: str = "generated"
    checked: int = 0
    wanted: int = 0
    most_copied: int = 0
    cached_choices: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: {"prefill": 0, "decode": 0})

    def __post_init__(self) -> None:
        # A layer whose experts are all on the GPU does not tell its routing.
        self.layers = moe_layers(self.exe.plan)
        self.telling = [n for n, layer in enumerate(self.layers) if _tells(layer)]

    def step(self, max_batch: int) -> None:
        """One of what users do, of those that are possible."""
        random = self.random
        room = [s for s in self.live if len(s.ids) < CONTEXT - 1]
        could = ["decode"] * 3 * bool(room) + ["prompt"] * 2 * bool(room) + ["open"] * 3 * (len(self.live) < max_batch)
        could += ["cut", "close"] * bool(self.live) + ["which"] * any(n.placement.deferred for n in self.layers)
        match random.choice(could):
            case "open":
                self.live.append(Sequence(self.exe.runtime.session()))
                self.prompt(self.live[-1])
            case "prompt":
                self.prompt(random.choice(room))
            case "decode":
                self.decode(random.sample(room, random.randint(1, len(room))))
            case "cut":
                sequence = random.choice(self.live)
                self.check(sequence)
                sequence.cut(random.randrange(len(sequence.ids)) if sequence.ids else 0)
            case "close":
                self.close(random.choice(self.live))
            case "which":
                self.deferral = random.choice(("generated", "all", "none"))
                self.exe.runtime.set_deferral(self.deferral)

    def prompt(self, sequence: Sequence) -> None:
        start, most = len(sequence.ids), CONTEXT - 1 - len(sequence.ids)
        fed = self._tokens(self.random.randint(1, min(most, 14)))
        before, generated = len(self.steps), start > 0 and len(fed) == 1  # as hetcomp.h says
        if self.random.random() < 0.5:
            rows = sequence.session.forward(fed)
        else:
            rows = sequence.session.prefill(fed)[None]
        sequence.ids += fed
        places = range(start, len(sequence.ids))
        sequence.rows |= zip(places[-len(rows) :], rows, strict=True)
        if self.deferral == "all" or (generated and self.deferral == "generated"):
            sequence.deferred |= set(places)
        self.tokens["decode" if generated else "prefill"] += len(fed)
        for step in self.steps[before:]:
            assert step.decode == generated
            sequence.routed |= zip(step.positions.tolist(), step.experts.swapaxes(0, 1), strict=True)
            self._count(step)

    def decode(self, sequences: list[Sequence]) -> None:
        fed = self._tokens(len(sequences))
        before = len(self.steps)
        rows = self.exe.runtime.decode([s.session for s in sequences], fed)
        for i, sequence in enumerate(sequences):
            place = len(sequence.ids)
            sequence.ids.append(fed[i])
            sequence.rows[place] = rows[i]
            sequence.deferred |= {place} if self.deferral != "none" else set()
            for step in self.steps[before:]:
                assert step.decode and step.positions[i] == place
                sequence.routed[place] = step.experts[:, i]
        self.tokens["decode"] += len(fed)
        for step in self.steps[before:]:
            self._count(step)

    def close(self, sequence: Sequence) -> None:
        self.check(sequence)
        sequence.session.close()
        self.live.remove(sequence)

    def check(self, sequence: Sequence) -> None:
        """The rows and the routing since it was last cut, and before."""
        assert len(sequence.session) == len(sequence.ids)
        if not sequence.ids:
            return
        ids = torch.tensor([sequence.ids])
        with torch.no_grad(), routing(self.model) as routed:
            want = deferred_logits(self.model, ids, self.exe.plan, sequence.deferred)
        for place, row in sequence.rows.items():
            assert relative_error(row, want[place]) < TOLERANCE, f"at place {place} of {sequence}"
        self.checked += len(sequence.rows)
        assert self.telling == [] or sorted(sequence.routed) == list(range(len(sequence.ids)))
        for place, experts in sequence.routed.items():
            for got, layer in zip(experts, self.telling, strict=True):
                assert sorted(got.tolist()) == sorted(routed[layer][place]), f"layer {layer}, place {place}"

    def _tokens(self, count: int) -> list[int]:
        return [self.random.randrange(3, self.model.config.vocab_size) for _ in range(count)]

    def _count(self, step: RoutedStep) -> None:
        """What a step adds to the sums."""
        if len(step.positions) <= max(decode_rows(self.exe.plan)):  # a short prompt streams nothing, too
            cache = self.exe.plan.expert_cache
            self.cached_choices += step.experts[0].size * len(cache.first) if cache else 0
        elif self.exe.plan.stream is not None and self.deferral != "all":
            for experts, number in zip(step.experts, self.telling, strict=True):
                layer = self.layers[number]
                if layer.hands_over:
                    self.wanted += sum(layer.on_cpu[expert] for expert in np.unique(experts))
                    self.most_copied += sum(layer.on_cpu)

    def chosen(self) -> list[list[int]]:
        """By layer that tells its routing and expert: how many tokens have chosen it."""
        experts = np.concatenate([step.experts for step in self.steps], axis=1)
        return [np.bincount(e.ravel(), minlength=self.layers[0].attrs.experts).tolist() for e in experts]


def _tells(layer: MoeLayer) -> bool:
    return layer.hands_over or memory_of(layer.placement.device) == CPU


@contextmanager
def routing(model: PreTrainedModel) -> Iterator[list[list[list[int]]]]:
    """Within, of every MoE layer the experts that each token of a sequence chooses."""
    found: list[list[list[int]]] = []
    experts = [m for m in model.modules() if type(m).__name__.endswith("Experts")]
    hooks = [m.register_forward_pre_hook(lambda _, args: found.append(args[1].tolist())) for m in experts]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def check_sums(run: Run, plan: RandomPlan, stats: dict, counts: dict | None) -> None:
    """The runtime's statistics are those of the steps: each choice is the GPU's, is streamed, or is the CPU's."""
    for phase, tokens in run.tokens.items():
        assert stats[phase]["tokens"] == tokens
    streamed = stats["gpu"].get("streamed")
    assert (streamed is not None) == (run.exe.plan.stream is not None)
    cache = stats["gpu"].get("cache")
    if streamed is not None:
        # With a cache, those that are in its slots are not wanted.
        assert streamed["experts_wanted"] == run.wanted or (cache and streamed["experts_wanted"] < run.wanted)
        assert 0 <= streamed["experts_copied"] <= run.most_copied
    assert (counts is not None) == (len(run.telling) == len(moe_layers(run.exe.plan)))
    if counts is not None:
        assert counts["frequency"] == run.chosen() and counts["tokens"] == sum(run.tokens.values())
    if cache is not None:
        assert cache["hits"] + cache["misses"] == run.cached_choices
        assert plan.cache_bytes or cache["swaps"] == 0


def refusal(plan: RandomPlan) -> str:
    """The words of the sentence in which a plan that cannot be is refused; empty: it can be."""
    if plan.cache != "static" and plan.deferral:
        return "exclude each other"
    if plan.cache != "static" and plan.cut:
        return "needs experts in one piece"
    return ""


def counts_experts(exe: Executable) -> bool:
    """Begins to count; False where some layers' routing stays on a GPU, which is refused."""
    if all(layer.hands_over or memory_of(layer.placement.device) == CPU for layer in moe_layers(exe.plan)):
        exe.count_experts()
        return True
    with pytest.raises(HetcompError, match="stays on the GPU"):
        exe.count_experts()
    return False


@pytest.mark.parametrize("plan", PLANS)
def test_a_random_plan_gives_the_logits_of_transformers_and_sums_that_add_up(plan: RandomPlan, tmp_path: Path):
    print(repr(plan))  # of a failure
    model = save_tiny(plan.family, tmp_path / "hf", odd=plan.odd, **plan.sizes)
    with emulated_gpu(compute_capability=89, devices=plan.gpus):
        if words := refusal(plan):
            with pytest.raises(HetcompError, match=words):
                plan.compile(tmp_path)
            return
        exe = plan.compile(tmp_path)
        counting = counts_experts(exe)
        with recorded_steps(exe.runtime) as steps:
            run = Run(model, exe, Random(plan.seed), steps)
            for _ in range(STEPS):
                run.step(plan.max_batch)
            for sequence in list(run.live):
                run.close(sequence)
        stats = exe.stats
        counts = json.loads(exe.expert_statistics()) if counting else None
        exe.runtime.close()
    assert run.checked > 0
    check_sums(run, plan, stats, counts)
