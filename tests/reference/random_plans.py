"""Plans drawn at random: a tiny model, a home for each of its experts, deferral or a cache, and rates of streaming."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from unittest import mock

import hetcomp
from hetcomp.executable import Executable
from hetcomp.hardware.figures import BandwidthPoint
from hetcomp.ir.annotations import ExpertPlacement, NodeSlice, Placement, StreamRates
from hetcomp.ir.homes import CPU, memory_of
from hetcomp.ir.ops import MoeExperts
from hetcomp.ir.plan import Plan
from hetcomp.passes import pipeline
from hetcomp.passes.context import Context
from hetcomp.plan_wishes import PlanWishes
from tests.reference.plan_builder import avx2_machine, gpu
from tests.reference.tiny_models import config

CONTEXT = 32
FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v3")  # dense layers between; biases; a dense layer first, shared experts
# What is not pinned goes to the GPU as long as it fits: the CPU's memory takes so long to read.
SLOW = BandwidthPoint(threads=4, gb_per_s=0.01)


@dataclass(frozen=True)
class RandomPlan:
    """spines: of every layer the device that makes the input of its experts. homes: of every layer a letter for each
    expert: g, the spine's GPU, or the CPU's node 0 or 1; where experts are cut over two nodes, all of the CPU's are 0.
    stream_slots, rates: what the plan says of streaming, if it streams; cache_slots, cache_bytes: of its cache, and
    what may be copied in a step."""

    seed: int
    family: str
    odd: bool
    dense: tuple[int, ...]
    spines: tuple[str, ...]
    homes: tuple[str, ...]
    nodes: int
    deferral: int
    cache: str
    cache_slots: int
    cache_bytes: int
    stream_slots: int
    rates: StreamRates
    max_batch: int

    def __str__(self) -> str:
        what = f"defer{self.deferral}-{self.cache}" if self.deferral else self.cache
        return f"{self.seed}-{self.family}-{what}-{','.join(self.homes)}"

    @property
    def sizes(self) -> dict[str, object]:
        """Of the tiny model."""
        width = "intermediate_size" if self.family == "gpt_oss" else "moe_intermediate_size"
        found: dict[str, object] = {width: 96} if self.cut else {}  # two pieces of whole groups
        return found | ({"mlp_only_layers": list(self.dense)} if self.family == "qwen3_moe" else {})

    @property
    def gpus(self) -> int:
        """How many take part."""
        return 2 if "gpu:1" in self.spines else 1

    @property
    def cut(self) -> bool:
        """Whether each of the CPU's experts lies in two pieces."""
        return self.nodes == 2 and not any("1" in homes for homes in self.homes)

    def compile(self, folder: Path) -> Executable:
        """The model in ``folder``/hf, of the family and ``sizes``. Raises HetcompError where the plan is refused."""
        plain = avx2_machine(self.nodes)
        slow = tuple(node.model_copy(update={"read_bandwidth": (SLOW,)}) for node in plain.nodes)
        machine = plain.model_copy(update={"gpus": (gpu(),) * self.gpus, "nodes": slow})
        spines = (f"*@{layer}={spine}" for layer, spine in enumerate(self.spines))
        pins = (*spines, "moe.experts=cpu")
        with self._decided():
            return hetcomp.compile(
                folder / "hf",
                machine,
                formats="f32",
                context_length=CONTEXT,
                max_batch=self.max_batch,
                out=folder / "tiny.hetc",
                isa=("avx2",),
                wishes=PlanWishes(pins=pins, deferral=self.deferral, expert_cache=self.cache),
            )

    @contextmanager
    def _decided(self) -> Iterator[None]:
        """Within, passes decide as it was drawn, where they decide anything."""
        own = {"place": self._place, "stream_experts": self._stream, "cache_experts": self._cached}

        def patched(plan_pass: pipeline.PlanPass) -> pipeline.PlanPass:
            change = own.get(plan_pass.name)
            if change is None:
                return plan_pass

            def function(plan: Plan, context: Context) -> Plan:
                return change(plan_pass.function(plan, context))

            return replace(plan_pass, function=function)

        with mock.patch.object(pipeline, "PIPELINE", tuple(map(patched, pipeline.PIPELINE))):
            yield

    def _place(self, plan: Plan) -> Plan:
        calls = []
        for call in plan.calls:
            attrs = {op.id: op.attrs for op in plan.template(call.template).ops}
            placements = tuple(
                (
                    op,
                    self._at_home(placement, a, self.homes[call.layer or 0])
                    if isinstance(a, MoeExperts)
                    else placement,
                )
                for op, placement in call.placements
                for a in (attrs[op],)
            )
            calls.append(replace(call, placements=placements))
        return replace(plan, calls=tuple(calls))

    def _at_home(self, placement: Placement, attrs: MoeExperts, homes: str) -> Placement:
        assert len(homes) == attrs.experts
        main = next(run.device for run in placement.experts)
        assert memory_of(main) == CPU
        runs: list[ExpertPlacement] = []
        for expert, home in enumerate(homes):
            device = placement.device if home == "g" else main if self.cut or self.nodes == 1 else f"cpu:{home}"
            if runs and runs[-1].device == device:
                runs[-1] = replace(runs[-1], last=expert)
            else:
                runs.append(ExpertPlacement(expert, expert, device))
        on_cpu = set(homes) - {"g"}
        slices = placement.slices
        if self.nodes == 2 and not self.cut and len(on_cpu) == 1:  # or slice_numa would cut them
            slices = (NodeSlice(int(on_cpu.pop()), 0, attrs.intermediate),)
        return replace(placement, experts=tuple(runs), slices=slices)

    def _stream(self, plan: Plan) -> Plan:
        if plan.stream is None:
            return plan
        slots = min(self.stream_slots, plan.stream.slots)
        return replace(plan, stream=replace(plan.stream, slots=slots, rates=self.rates))

    def _cached(self, plan: Plan) -> Plan:
        cache = plan.expert_cache
        if cache is None:
            return plan
        gpus = tuple(replace(on, slots=self.cache_slots, bytes_per_step=self.cache_bytes) for on in cache.gpus)
        return replace(
            plan, expert_cache=replace(cache, gpus=gpus, first=tuple(f[: self.cache_slots] for f in cache.first))
        )


def draw(seed: int) -> RandomPlan:
    """The same for the same seed."""
    random = Random(seed)
    family, odd = random.choice(FAMILIES), random.random() < 0.5
    sizes = config(family, odd)
    layers, top_k = sizes.num_hidden_layers, sizes.num_experts_per_tok
    experts = next(
        getattr(sizes, n) for n in ("num_experts", "num_local_experts", "n_routed_experts") if hasattr(sizes, n)
    )
    dense = tuple(random.sample(range(layers), random.choice((0, 1)))) if family == "qwen3_moe" else ()
    gpus, nodes = random.choice((1, 1, 2)), random.choice((1, 1, 2))
    on_gpu = random.randrange(layers - 1), layers - 1  # so that there is something to hand over
    spines = tuple(
        f"gpu:{random.randrange(gpus)}" if layer in on_gpu or random.random() < 0.8 else CPU for layer in range(layers)
    )
    deferral, cache = random.choice(((0, "static"), (1, "static"), (2, "static"), (0, "lru"), (0, "lfu"), (1, "lru")))
    whole = nodes == 2 and random.random() < 0.5
    return RandomPlan(
        seed=seed,
        family=family,
        odd=odd,
        dense=dense,
        spines=spines,
        homes=tuple(_homes(random, experts, spine != CPU and cache == "static", whole) for spine in spines),
        nodes=nodes,
        deferral=deferral,
        cache=cache,
        cache_slots=random.randint(top_k, experts),
        cache_bytes=random.choice((0, 1 << 16, 1 << 30)),
        stream_slots=random.randint(1, experts),
        rates=_rates(random),
        max_batch=random.randint(1, 4),
    )


def _homes(random: Random, experts: int, mixed: bool, whole: bool) -> str:
    on_gpu = random.choice((0.0, 0.2, 0.6, 1.0)) if mixed else 0.0
    return "".join("g" if random.random() < on_gpu else random.choice("01") if whole else "0" for _ in range(experts))


def _rates(random: Random) -> StreamRates:
    """An expert is some 25 us of the link, and as fast on the CPU, slower or faster."""
    cpu = 10 ** random.uniform(-1, 3)
    curve = (1, cpu), (64, cpu * random.uniform(1, 4))
    return StreamRates(random.choice((0.5, 1.0)), 100.0, curve, ((1, 1.0), (64, 1.0)))
