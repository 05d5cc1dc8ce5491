"""What reading experts from the disk a layer ahead would gain, where the next router, applied early, names them.

python -m benchmarks.disk_prefetch [--model demo-moe] [--tokens 1500] [--rooms 0.2,0.35,0.5,0.75,0.9,0.95]
    [--disks 1,3.5,7,14] [--reads 76] [--gpu-us 63]   # six minutes of one core

Decode steps are simulated on the planner's lanes with routing recorded from transformers in float32 on each text of
models_zoo/eval (early_routing.py), a token a step: a lane of CPU cores, which read ``--reads`` GB/s of weights (two
channels of DDR5), and one of the disk. Experts, attention and router have the bytes of Qwen3-30B-A3B's in q4; the
numbers of layers and choices are the model's own. Attention is the CPU's, or a GPU's, which takes ``--gpu-us`` from one
layer's experts to the next. The page cache has room for ``--rooms`` of all experts and drops the one that was asked for
longest ago. A layer's experts are computed when those that were missing are read, as in plans (passes/disk_reads.py),
at half of the speed of other weights, which lie in larger pages.

Ahead of a layer, behind the attention of the one before, the first k/2 or k experts that its router names are asked for
(or those that it will choose, for comparison). What is missing of them is read behind what the layer before waits for,
and before what the layer itself will find missing. The samples are the texts.
"""

from __future__ import annotations

import argparse
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import transformers
from rich.console import Console

from benchmarks.cpu_e2e import show
from benchmarks.early_routing import PLACES, EarlyRouting, early_routing
from benchmarks.record import Record
from hetcomp.cli.progress import RichProgress
from hetcomp.models_zoo import find
from hetcomp.passes.device_time import GPU_LAUNCH_US
from hetcomp.passes.lane_engine import Task, run_lanes
from hetcomp.progress import ProgressSink

_WARM = 500  # tokens of a text before anything counts
_Q4 = 18 / 32  # bytes of a weight
_EXPERT_BYTES = 3 * 2048 * 768 * _Q4
_DENSE_BYTES = 2 * 2048 * (4096 + 512) * _Q4 + 4 * 2048 * 128  # attention in q4, router in f32
_ROUTER_BYTES = 4 * 2048 * 128


class PageCache:
    """Experts by (layer, expert), of which it has ``room``: what was asked for longest ago goes first."""

    def __init__(self, room: int) -> None:
        """Empty."""
        self._room = room
        self._there: OrderedDict[tuple[int, int], None] = OrderedDict()

    def ask(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Those that must be read; all are there now."""
        missing = []
        for expert in experts:
            if (layer, expert) not in self._there:
                missing.append(expert)
            self._there[layer, expert] = None
            self._there.move_to_end((layer, expert))
        while len(self._there) > self._room:
            self._there.popitem(last=False)
        return missing


@dataclass(frozen=True)
class LayerReads:
    """Of one layer in one step: experts that are ``missing`` when it has routed, those read ``ahead`` for it, in the
    order in which they were asked for, and how many of these are among its choices (``right``, by place in it)."""

    missing: int
    ahead: int
    right: tuple[int, ...]


@dataclass(frozen=True)
class Speeds:
    """Microseconds: what lies between two layers' experts (``dense``), a layer's ``experts``, one expert from the disk
    (``read``), and applying the next layer's ``router`` early (0: that is not done)."""

    dense: float
    experts: float
    read: float
    router: float


def reads_of(
    cache: PageCache, chosen: Sequence[Sequence[int]], named: Sequence[Sequence[int]]
) -> tuple[LayerReads, ...]:
    """A step through the cache. chosen: by layer; named: of the layers from the second on, those to read ahead."""
    found, ahead = [], list[int]()
    for layer, choices in enumerate(chosen):
        missing = cache.ask(layer, choices)
        found.append(LayerReads(len(missing), len(ahead), tuple(i for i, e in enumerate(ahead) if e in choices)))
        if layer + 1 < len(chosen):
            ahead = cache.ask(layer + 1, named[layer])
    return tuple(found)


def step_us(layers: Sequence[LayerReads], speeds: Speeds) -> float:
    """The step on its lanes."""
    tasks: list[Task] = []

    def add(role: str, layer: int, lane: str, us: float, after: tuple[int, ...]) -> int:
        tasks.append(Task(role, layer, lane, us, after))
        return len(tasks) - 1

    asked: list[int] = []  # reads for the layer
    for number, layer in enumerate(layers):
        routed = add("dense", number, "cpu:0", speeds.dense, ())
        if speeds.router and number + 1 < len(layers):
            routed = add("router", number, "cpu:0", speeds.router, (routed,))
        waits = [asked[i] for i in layer.right]
        waits += [add("read", number, "disk", speeds.read, (routed,)) for _ in range(layer.missing)]
        ahead = layers[number + 1].ahead if number + 1 < len(layers) else 0
        asked = [add("read ahead", number + 1, "disk", speeds.read, (routed,)) for _ in range(ahead)]
        add("experts", number, "cpu:0", speeds.experts, (routed, *waits))
    return run_lanes(tasks, joint_gb_per_s=1.0).total_us  # no task says what it reads of the memory


def replay(
    routing: EarlyRouting, named: Sequence[Sequence[Sequence[int]]], room: int
) -> Counter[tuple[LayerReads, ...]]:
    """How often each way of a step comes about among the tokens behind the first. named: by token and layer."""
    cache = PageCache(room)
    steps = [reads_of(cache, *token) for token in zip(routing.chosen.tolist(), named, strict=True)]
    return Counter(steps[_WARM:])


def ways(routing: EarlyRouting) -> dict[str, list[list[list[int]]]]:
    """What is asked for ahead, by token and layer."""
    top_k, behind_attention = routing.chosen.shape[2], routing.named[PLACES[0]]
    named = {f"{n} named": behind_attention[..., :n].tolist() for n in (top_k // 2, top_k)}
    return {"nothing": behind_attention[..., :0].tolist()} | named | {"the chosen": routing.chosen[:, 1:].tolist()}


def add(record: Record, routing: EarlyRouting, o: argparse.Namespace, progress: ProgressSink) -> None:
    """All rooms and disks for one text: the step's time with nothing ahead, and what of it is saved."""
    _, layers, top_k = routing.chosen.shape
    for room in o.rooms:
        plain: dict[str, float] = {}
        for way, named in ways(routing).items():
            steps = replay(routing, named, int(room * layers * o.experts))
            name = f"room {room:g}, {way} ahead"
            _add_reads(record, name, steps)
            for disk in o.disks:
                for device in ("CPU", "GPU"):
                    speeds = _speeds(o, device, disk, top_k, applies=way != "nothing")
                    us = sum(step_us(step, speeds) * n for step, n in steps.items()) / steps.total()
                    where = f"{disk:g} GB/s, attention on the {device}"
                    if way == "nothing":
                        record.add(f"{name}: step, {where}", "us", us, higher_is_better=False)
                        plain[where] = us
                    else:
                        record.add(f"{name}: saved, {where}", "%", 100 * (1 - us / plain[where]))
            progress.advance()


def _add_reads(record: Record, name: str, steps: Counter[tuple[LayerReads, ...]]) -> None:
    reads = [
        (sum(r.missing for r in s), sum(r.ahead for r in s), sum(len(r.right) for r in s), n) for s, n in steps.items()
    ]
    missing, ahead, right = (sum(row[i] * row[3] for row in reads) / steps.total() for i in range(3))
    record.add(f"{name}: reads that a layer waits for, a token", "", missing, higher_is_better=False)
    record.add(f"{name}: reads ahead, a token", "", ahead, higher_is_better=False)
    record.add(f"{name}: reads ahead that were right, a token", "", right)


def _speeds(o: argparse.Namespace, device: str, disk: float, top_k: int, *, applies: bool) -> Speeds:
    dense = o.gpu_us if device == "GPU" else _DENSE_BYTES / o.reads / 1e3
    router = 2 * GPU_LAUNCH_US if device == "GPU" else _ROUTER_BYTES / o.reads / 1e3
    return Speeds(
        dense, 2 * top_k * _EXPERT_BYTES / o.reads / 1e3, _EXPERT_BYTES / disk / 1e3, router if applies else 0.0
    )


def main() -> None:
    """Command line."""

    def numbers(text: str) -> list[float]:
        return [float(n) for n in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo-moe")
    parser.add_argument("--tokens", type=int, default=1500, help="of each text")
    parser.add_argument("--rooms", type=numbers, default=[0.2, 0.35, 0.5, 0.75, 0.9, 0.95])
    parser.add_argument("--disks", type=numbers, default=[1.0, 3.5, 7.0, 14.0], help="GB/s")
    parser.add_argument("--reads", type=float, default=76.0, help="GB/s")
    parser.add_argument("--gpu-us", type=float, default=63.0)
    o = parser.parse_args()
    folder = find(o.model)
    o.experts = int(transformers.AutoConfig.from_pretrained(folder).num_experts)
    record = Record("disk_prefetch", vars(o) | {"warm": _WARM, "dtype": "float32"})
    record.versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    with RichProgress(Console(stderr=True)) as progress:
        texts = early_routing(folder, o.tokens, progress)
        record.conditions["texts"] = list(texts)
        progress.stage("simulate", total=len(texts) * len(o.rooms) * 4)
        for routing in texts.values():
            add(record, routing, o, progress)
    show(record)
    print(record.write())


if __name__ == "__main__":
    main()
