"""What copying experts to a GPU a layer ahead would gain, where the next layer's router, applied early, names them.

python -m benchmarks.expert_prefetch [--model demo-moe] [--tokens 3000] [--slots 8] [--per-step 12]
    [--profiles preset:h100-sxm+8480-256gb,preset:rtx5090+9950x-64gb,preset:rtx4090+14900k-64gb]

The router of each layer but the first is applied to hidden states of the layer before, of transformers in float32 on
each text of models_zoo/eval. What it names behind attention could be copied while the layer's experts and the next
attention run; what it names on the layer's output comes too late for that. The samples of recall are the layers, from
the second on; those of all else are the texts. The runtime's cache policy is replayed, a token a step, and of the first
k or 2k experts named for a layer (or of those it will choose, for comparison) the first one or two that are in no slot
are copied to places of their own, for this step alone.

Times are of Qwen3-30B-A3B's experts in q4, by figures traced with it on an H200 (docs/decisions/expert-cache.md) and by
those of profiles, data sheets unless they were measured; the GPU's time between two layers is ``--layer-us`` in all.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.cpu_e2e import show
from benchmarks.early_routing import PLACES, EarlyRouting, Experts, early_routing, recall
from benchmarks.record import Record
from hetcomp.cli.progress import RichProgress
from hetcomp.hardware.profile import load_profile
from hetcomp.models_zoo import find
from hetcomp.passes.cache_policy import CachedShape, CachePolicy, CacheRule
from hetcomp.passes.device_time import joint_gb_per_s, launch_us, link_gb_per_s
from hetcomp.passes.memory_contention import reads_slowdown
from hetcomp.progress import ProgressSink

_WARM = 500  # tokens of a text before anything counts
_AHEAD = (1, 2)  # experts that may be copied ahead for a layer
_EXPERT_BYTES = 3 * 2048 * 768 * 18 // 32  # 18 bytes for 32 weights
_GEMV_READS = 0.85  # of a node's bandwidth: bandwidth_fraction of the presets
_NODES_US = 9.0  # two nodes of a graph, of which one lets copies begin and one waits for them


@dataclass(frozen=True)
class CopiedAhead:
    """By token and layer, i64 [N, layers]: choices whose expert was in no slot (``missing``), those of them that had
    been copied (``right``), and all experts that were ``copied``."""

    missing: NDArray[np.int64]
    right: NDArray[np.int64]
    copied: NDArray[np.int64]


@dataclass(frozen=True)
class Costs:
    """Microseconds: a missing expert on the CPU (``expert``), its copy to the GPU (``copy``), what a layer with a
    missing one takes besides (``meet``: the threads', twice), a layer's time where nothing is missing (``layer``), and
    what applying the next router and waiting for copies adds to it (``ahead``). ``slowdown``: of experts on the CPU
    beside a copy."""

    expert: float
    copy: float
    meet: float
    layer: float
    ahead: float
    slowdown: float

    @staticmethod
    def traced(layer_us: float) -> Costs:
        """Of one H200 and 15 threads: experts at 115 GB/s, the link at 53, of 146 for both; two launches of 2 us."""
        return Costs(23.0, 50.0, 6.0, layer_us, 4.0 + _NODES_US, reads_slowdown(115.0, 53.0, 146.0))

    @staticmethod
    def of(profile: str, layer_us: float) -> Costs:
        """Of the profile's first GPU and node."""
        machine = load_profile(profile)
        gpu, reads = machine.gpus[0], _GEMV_READS * machine.bandwidth(machine.nodes[0].id)
        link = link_gb_per_s(gpu)
        return Costs(
            expert=_EXPERT_BYTES / reads / 1e3,
            copy=_EXPERT_BYTES / link / 1e3,
            meet=2 * machine.barrier_us,
            layer=layer_us,
            ahead=2 * launch_us(gpu) + _NODES_US,  # norm and router
            slowdown=reads_slowdown(reads, link, joint_gb_per_s(machine)),
        )


def held_by(
    rule: CacheRule, chosen: Experts, experts: int, slots: int, per_step: int, progress: ProgressSink
) -> NDArray[np.bool_]:
    """By token, layer and expert whether it is in a slot: the policy on ``chosen`` [N, layers, k]."""
    layers = chosen.shape[1]
    policy = CachePolicy(rule, [CachedShape(experts, 1)] * layers, slots, per_step)
    for layer in range(layers):
        for expert in range(slots):
            policy.place(layer, expert, expert)
    found = np.empty((len(chosen), layers, experts), np.bool_)
    for token, choices in enumerate(chosen):
        policy.choose()
        policy.begin_step(1, True)
        policy.count(choices[:, None])
        found[token] = policy.held
        policy.arrived()
        progress.advance()
    return found


def copy_ahead(held: NDArray[np.bool_], chosen: Experts, named: Experts, ahead: int) -> CopiedAhead:
    """Copies of the first ``ahead`` experts of ``named`` [N, layers - 1, n] that are not ``held`` [N, layers, experts],
    for all layers but the first, and what they are worth to ``chosen`` [N, layers, k]."""
    missing = ~np.take_along_axis(held, chosen, axis=2)
    away = ~np.take_along_axis(held[:, 1:], named, axis=2)
    copied = away & (away.cumsum(axis=2) <= ahead)
    right = copied & (named[..., None] == chosen[:, 1:, None]).any(axis=-1)

    def by_layer(some: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.concatenate([np.zeros((len(some), 1), np.int64), some.sum(axis=2)], axis=1)

    return CopiedAhead(missing.sum(axis=2), by_layer(right), by_layer(copied))


def step_us(missing: NDArray[np.int64], copied: NDArray[np.int64], costs: Costs) -> float:
    """Mean time of a token's layers; missing, copied: [N, layers]. Copies for a layer begin when the one before has
    its attention behind it, and are in time if from there to the next layer's experts it takes as long.

    Left out, all of which speaks for copying ahead: the GPU computes its own experts beside the CPU's, the link has
    other copies to carry, and is slower itself beside the CPU.
    """
    cpu = missing * costs.expert + (missing > 0) * costs.meet
    copying = np.zeros(copied.shape)
    copying[:, :-1] = copied[:, 1:] * costs.copy
    # Beside a copy the CPU does 1 / slowdown of its work.
    cpu += np.minimum(cpu * costs.slowdown, copying) * (1 - 1 / costs.slowdown)
    layers = costs.layer + cpu
    late = np.maximum(0.0, copying - layers)
    ahead = costs.ahead * (copied.shape[1] - 1) if copied.any() else 0.0
    return float((layers + late).sum(axis=1).mean()) + ahead


def add_recall(record: Record, text: str, routing: EarlyRouting) -> None:
    """By place in the layer before, and among k or 2k; the layers are the samples."""
    top_k = routing.chosen.shape[2]
    for place in PLACES:
        for among in (top_k, 2 * top_k):
            for part in recall(routing.chosen[:, 1:], routing.named[place], among):
                record.add(f"{text}, {place}: choices among {among} named", "%", 100 * float(part))


def add_replay(
    record: Record, name: str, held: NDArray[np.bool_], routing: EarlyRouting, costs: dict[str, Costs]
) -> None:
    """Hits and times with and without copies ahead, of the tokens behind the first."""
    held, chosen = held[_WARM:], routing.chosen[_WARM:]
    top_k, behind_attention = chosen.shape[2], routing.named[PLACES[0]][_WARM:]
    sets = {f"{n} named": behind_attention[..., :n] for n in (top_k, 2 * top_k)} | {"the chosen": chosen[:, 1:]}
    plain = copy_ahead(held, chosen, behind_attention, 0)
    record.add(f"{name}: hits", "%", 100 * (1 - float(plain.missing.mean()) / top_k))
    record.add(f"{name}: layers with a miss", "%", 100 * float((plain.missing > 0).mean()), False)
    for of, named in sets.items():
        for ahead in _AHEAD:
            way, found = f"{name}, {ahead} ahead of {of}", copy_ahead(held, chosen, named, ahead)
            missing = found.missing - found.right
            record.add(f"{way}: hits", "%", 100 * (1 - float(missing.mean()) / top_k))
            record.add(f"{way}: layers with a miss", "%", 100 * float((missing > 0).mean()), False)
            record.add(f"{way}: copies a token", "", float(found.copied.sum(axis=1).mean()), False)
            record.add(f"{way}: copies that were right", "%", 100 * float(found.right.sum() / found.copied.sum()))
            for machine, cost in costs.items():
                before, after = step_us(plain.missing, plain.copied, cost), step_us(missing, found.copied, cost)
                record.add(f"{way}: time of the layers saved, {machine}", "%", 100 * (1 - after / before))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo-moe")
    parser.add_argument("--tokens", type=int, default=3000, help="of each text")
    parser.add_argument("--slots", type=int, default=8, help="experts of a layer on the GPU")
    parser.add_argument("--per-step", type=int, default=12, help="experts of all layers that are copied under a step")
    parser.add_argument(
        "--profiles",
        type=lambda text: text.split(","),
        default=["preset:h100-sxm+8480-256gb", "preset:rtx5090+9950x-64gb", "preset:rtx4090+14900k-64gb"],
    )
    parser.add_argument("--layer-us", type=float, default=63.0, help="a layer whose choices are all on the GPU")
    o = parser.parse_args()
    folder = find(o.model)
    experts = int(transformers.AutoConfig.from_pretrained(folder).num_experts)
    costs = {"traced": Costs.traced(o.layer_us)} | {name: Costs.of(name, o.layer_us) for name in o.profiles}
    record = Record("expert_prefetch", vars(o) | {"experts": experts, "warm": _WARM, "dtype": "float32"})
    record.conditions["costs, us"] = {name: vars(cost) for name, cost in costs.items()}
    record.versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    with RichProgress(Console(stderr=True)) as progress:
        texts = early_routing(folder, o.tokens, progress)
        record.conditions["texts"] = list(texts)
        rules: tuple[CacheRule, ...] = get_args(CacheRule)
        progress.stage("replay the cache", total=len(rules) * sum(len(routing.chosen) for routing in texts.values()))
        for text, routing in texts.items():
            add_recall(record, text, routing)
            for rule in rules:
                held = held_by(rule, routing.chosen, experts, o.slots, o.per_step, progress)
                add_replay(record, rule, held, routing, costs)
    show(record)
    print(record.write())


if __name__ == "__main__":
    main()
