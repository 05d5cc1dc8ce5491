"""The placement problem in numbers: groups of ops and sets of experts, what each takes where, and the limits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hetcomp.errors import HetcompError
from hetcomp.hardware.figures import Gpu
from hetcomp.ir import ops
from hetcomp.ir.adaptable import OPERANDS
from hetcomp.ir.kv_pool import KvPool
from hetcomp.ir.plan import Call, Op, Plan, Template, Value, ValueKind
from hetcomp.passes.adapter_memory import pair_bytes
from hetcomp.passes.context import Context
from hetcomp.passes.device_time import copy_us, gpu_time, handshake_us, joint_gb_per_s, launch_us, link_gb_per_s
from hetcomp.passes.disk_reads import expected_reads
from hetcomp.passes.expert_statistics import inclusion
from hetcomp.passes.expert_time import expert_cpu_us, expert_gpu_us, expert_work
from hetcomp.passes.memory_table import GPU_RESERVE, expert_weight_bytes, gpu_limit, workspace_estimate
from hetcomp.passes.phases import Phase, phases
from hetcomp.passes.pins import cached_in_cpu_memory, pinned_device
from hetcomp.passes.placement_groups import beside_experts, op_groups
from hetcomp.passes.stream_experts import stream_reserves
from hetcomp.passes.stream_weights import ring_reserves
from hetcomp.passes.work import activation_bytes, work_of

# Experts in flight to the GPU: two halves of a ring of this many.
STAGED_EXPERTS = 16

Times = tuple[float, ...]  # microseconds by phase


@dataclass(frozen=True)
class Group:
    """Ops of one call that go together. ``cpu_us``, ``gpu_us[i]``: time by phase; ``stream_us[i]``: the time to copy
    the weights to that GPU. ``sliced_bytes`` can be cut over nodes, ``whole_bytes`` (states, small weights) lie on
    the main node. ``beside``: runs while the call's experts do. ``pin``: device, where that is decided; ``gpu``: any
    of the GPUs. ``layers``:
    how many equal layers the figures are the sum of (see placement_blocks)."""

    call: int
    ops: tuple[str, ...]
    cpu_us: Times
    gpu_us: tuple[Times, ...]
    stream_us: tuple[float, ...]
    sliced_bytes: int
    whole_bytes: int
    state_bytes: int
    beside: bool
    pin: str | None
    layers: int = 1

    def may_be_on(self, device: str) -> bool:
        """Whether the pin allows it."""
        return self.pin in (None, device) or (self.pin == "gpu" and device.startswith("gpu:"))

    @property
    def bytes(self) -> int:
        """Weights and states."""
        return self.sliced_bytes + self.whole_bytes

    @property
    def weight_bytes(self) -> int:
        """Without states."""
        return self.bytes - self.state_bytes

    @property
    def buffer_bytes(self) -> int:
        """Memory of a GPU to stream the weights through: this layer's, and the next one's on their way."""
        return 2 * self.weight_bytes // self.layers


@dataclass(frozen=True)
class Edge:
    """An activation written by one group and read by others; ``us[i]`` by phase: moving it to or from GPU i."""

    source: int
    readers: tuple[int, ...]
    us: tuple[Times, ...]


@dataclass(frozen=True)
class ExpertClass:
    """Experts of a layer that are chosen equally often: the time that one of them takes in the mean of a step, and
    the time to stream one that is needed. ``active``: the probability by phase that it is needed."""

    share: float
    members: tuple[int, ...]
    active: Times
    cpu_us: Times
    gpu_us: tuple[Times, ...]
    stream_us: tuple[Times, ...]


@dataclass(frozen=True)
class ExpertSet:
    """The experts of one MoE op. ``spine``: the group that makes their input; ``exchange_us[i]``: sending the input
    to the other side and the sum back, hand-shake included."""

    call: int
    op: str
    spine: int
    expert_bytes: int
    classes: tuple[ExpertClass, ...]
    exchange_us: tuple[Times, ...]
    pin: str | None
    layers: int = 1


@dataclass(frozen=True)
class Problem:
    """What place decides on. ``node_share`` and ``node_bytes``: part of sliced weights that each CPU node owns and
    what fits there, in order of the profile's compute nodes; ``main`` indexes the node that holds the rest.
    ``joint_share``: part of the memory's joint bandwidth that the fastest link takes while it copies. ``barrier_us``
    and ``launch_us[i]``: what it costs to start a layer's experts on the CPU and on GPU i. ``streaming``: weights may
    be copied to a GPU in every step, and experts live on another GPU than the one that makes their input; no code is
    generated for either. ``spread``: equal layers that are placed differently should stand apart."""

    phases: tuple[Phase, ...]
    groups: tuple[Group, ...]
    edges: tuple[Edge, ...]
    experts: tuple[ExpertSet, ...]
    gpu_bytes: tuple[int, ...]
    node_share: tuple[float, ...]
    node_bytes: tuple[int, ...]
    main: int
    workspace_bytes: int
    pinned_bytes: int
    joint_share: float = 0.0
    barrier_us: float = 0.0
    launch_us: tuple[float, ...] = ()
    streaming: bool = True
    spread: bool = False

    @property
    def staging_bytes(self) -> int:
        """Of the ring through which experts are streamed to a GPU, where any are."""
        return staging_bytes(max((e.expert_bytes // e.layers for e in self.experts), default=0))


def placement_problem(plan: Plan, context: Context) -> Problem:
    """Puts the problem together from the plan's ops and the profile."""
    profile = context.profile
    gpus = profile.gpus if context.use_gpus else ()
    nodes = profile.compute_nodes
    total = sum(profile.bandwidth(n.id) for n in nodes)
    share = tuple(profile.bandwidth(n.id) / total for n in nodes)
    builder = _Builder(plan, context, max(share))
    builder.build()
    main = max(range(len(nodes)), key=lambda i: (share[i], -i))
    caps = [gpu_limit(context, i) for i in range(len(gpus))]
    streams = [0] * len(caps) if context.planning else stream_reserves(plan, context, caps)
    rings = ring_reserves(plan, context, caps, streams)
    caps = [cap - stream - ring for cap, stream, ring in zip(caps, streams, rings, strict=True)]
    # What has no room in memory stays on the disk.
    on_disk = expert_weight_bytes(plan, context) if context.from_disk else 0
    reserve = GPU_RESERVE + KvPool.of(plan.max_dims()).granule_waste
    rooms = [cap - reserve - workspace_estimate(plan) for cap in caps]
    return Problem(
        phases=builder.steps,
        groups=_caches_first(builder.groups, rooms) if gpus and not context.planning else tuple(builder.groups),
        edges=tuple(builder.edges),
        experts=tuple(builder.experts),
        gpu_bytes=tuple(max(0, cap - reserve) for cap in caps),
        node_share=share,
        node_bytes=tuple(n.available_bytes + on_disk for n in nodes),
        main=main,
        workspace_bytes=workspace_estimate(plan),
        pinned_bytes=context.pinned_bytes if context.pinned_bytes is not None else profile.available_bytes(),
        joint_share=max((link_gb_per_s(g) for g in gpus), default=0.0) / joint_gb_per_s(profile),
        barrier_us=profile.barrier_us,
        launch_us=tuple(launch_us(g) for g in gpus),
        streaming=context.planning,
        spread=any(streams),
    )


def _caches_first(groups: Sequence[Group], rooms: Sequence[int]) -> tuple[Group, ...]:
    """The groups, those with KV caches pinned to the GPUs if all that are not pinned elsewhere fit there, each
    into the first of ``rooms`` (bytes) that has space for it.

    The mix that a plan is made for has one length of prompts; attention's time grows with their square, and an expert
    more on the GPU is not worth prompts of 16,000 tokens whose attention the CPU computes."""
    mine = [g for g in groups if g.state_bytes and g.pin is None]
    usable = [i for i, room in enumerate(rooms) if room > 0]
    left = [rooms[i] for i in usable]
    for group in mine:
        room = next((i for i, free in enumerate(left) if group.bytes <= free), None)
        if room is None:
            return tuple(groups)
        left[room] -= group.bytes
    pin = "gpu" if len(usable) > 1 else f"gpu:{usable[0] if usable else 0}"
    return tuple(replace(g, pin=pin) if g.state_bytes and g.pin is None else g for g in groups)


def staging_bytes(largest_expert: int) -> int:
    """Memory of a GPU for experts in flight: both halves of the ring."""
    return 2 * STAGED_EXPERTS * largest_expert


class _Builder:
    """Walks the calls in order; every template is taken apart once."""

    def __init__(self, plan: Plan, context: Context, largest_share: float) -> None:
        self.plan, self.context = plan, context
        self.disk = expected_reads(plan, context)
        self.gpus = context.profile.gpus if context.use_gpus else ()
        self.steps = tuple(step for step in phases(plan) if step.steps > 0)
        self.largest_share = largest_share
        self.groups: list[Group] = []
        self.edges: list[Edge] = []
        self.experts: list[ExpertSet] = []
        self._parts = {t.name: op_groups(t, context) for t in plan.templates}
        self._beside = {t.name: beside_experts(t) for t in plan.templates}
        self._resident: set[str] = set()
        self._values = plan.value_map()
        self._times: dict[tuple[str, str], tuple[Times, tuple[Times, ...]]] = {}
        self._pairs = pair_bytes(plan, context)
        self._moe_layer = 0

    def build(self) -> None:
        """Fills groups, edges and experts."""
        written: dict[str, tuple[int, Value]] = {}
        readers: dict[str, list[int]] = defaultdict(list)
        for index, call in enumerate(self.plan.calls):
            template = self.plan.template(call.template)
            actual = dict(zip(template.params, call.args, strict=True))
            actual |= dict(zip(template.results, call.results, strict=True))
            owner: dict[str, int] = {}
            for part in self._parts[template.name]:
                for op in part:
                    owner[op.id] = len(self.groups)
                self.groups.append(self._group(index, call, template, part, actual))
            for op in template.ops:
                if isinstance(op.attrs, ops.MoeExperts):
                    spine = next(owner[o.id] for o in template.ops if set(o.outputs) & {op.inputs[1]})
                    owner[op.id] = spine
                    self._charge_experts_pairs(spine, op, actual)
                    self.experts.append(self._expert_set(index, call, template, op, actual, spine))
                for name in op.inputs:
                    if template.value(name).kind is ValueKind.ACT:
                        readers[actual.get(name, f"{index}.{name}")].append(owner[op.id])
                for name in op.outputs:
                    written[actual.get(name, f"{index}.{name}")] = owner[op.id], template.value(name)
        for name, (source, value) in written.items():
            others = tuple(sorted(set(readers[name]) - {source}))
            if others:
                self.edges.append(Edge(source, others, tuple(self._crossing_us(g, value) for g in self.gpus)))

    def _charge_experts_pairs(self, spine: int, op: Op, actual: dict[str, str]) -> None:
        """A GPU that makes the input of experts has the pairs of all of them, wherever they are."""
        room = self.context.adapter_room
        if room is None or not room.experts:
            return
        size = sum(self._pairs.get(actual[name], 0) for name in op.inputs[3:5])
        group = self.groups[spine]
        self.groups[spine] = replace(group, whole_bytes=group.whole_bytes + size)

    def _crossing_us(self, gpu: Gpu, value: Value) -> Times:
        """Moving an activation to or from the GPU: half of a hand-shake, as a transfer of the simulation, and bytes."""
        return tuple(handshake_us(gpu) / 2 + copy_us(gpu, activation_bytes(value, step)) for step in self.steps)

    def _group(self, index: int, call: Call, template: Template, part: Sequence[Op], actual: dict[str, str]) -> Group:
        cpu = [0.0] * len(self.steps)
        gpu = [[0.0] * len(self.steps) for _ in self.gpus]
        sliced = whole = states = 0
        for op in part:
            op_cpu, op_gpu = self._op_times(template, op)
            share = self.largest_share if isinstance(op.attrs, ops.Linear) else 1.0
            for p in range(len(self.steps)):
                cpu[p] += op_cpu[p] * share
                for i in range(len(self.gpus)):
                    gpu[i][p] += op_gpu[i][p]
            weights, state = self._new_bytes(op, actual)
            sliced += weights if isinstance(op.attrs, ops.Linear) else 0
            whole += (0 if isinstance(op.attrs, ops.Linear) else weights) + state
            states += state
        pins = {pin for op in part if (pin := self._pin(template, op, call.layer)) is not None}
        if len(pins) > 1:
            pins = {pinned_device(self.context.pins, max(part, key=lambda o: len(o.inputs)), call.layer) or "cpu"}
        weight_bytes = sliced + whole - states
        whole += sum(
            self._pairs.get(actual.get(op.inputs[operand], ""), 0)
            for op in part
            if not isinstance(op.attrs, ops.MoeExperts)
            for operand in OPERANDS.get(op.kind, ())
        )
        return Group(
            call=index,
            ops=tuple(op.id for op in part),
            cpu_us=tuple(cpu),
            gpu_us=tuple(tuple(g) for g in gpu),
            stream_us=tuple(copy_us(g, weight_bytes) if weight_bytes else 0.0 for g in self.gpus),
            sliced_bytes=sliced,
            whole_bytes=whole,
            state_bytes=states,
            beside=any(op.id in self._beside[template.name] for op in part),
            pin=next(iter(pins), None),
        )

    def _pin(self, template: Template, op: Op, layer: int | None) -> str | None:
        """The device that the user decided, or the CPU where no GPU code can be generated for the op."""
        pin = pinned_device(self.context.pins, op, layer)
        if self.context.planning or not self.gpus or pin == "cpu":
            return pin
        refusal = self.context.target.gpu_refusal(op, template)
        if refusal is None:
            return pin
        if pin is not None:
            raise HetcompError(f"{op.origin or op.id} is pinned to {pin}, but {refusal}")
        return "cpu"

    def _op_times(self, template: Template, op: Op) -> tuple[Times, tuple[Times, ...]]:
        key = (template.name, op.id)
        if key not in self._times:
            values = template.value_map()
            works = [work_of(op, values, step, self.context.target) for step in self.steps]
            assert op.cost is not None
            barrier = self.context.profile.barrier_us
            cpu = tuple(op.cost.phase(step.name).us + barrier for step in self.steps)
            # Logits are wanted in CPU memory, wherever they are made.
            results = [values[name] for name in op.outputs if values[name].kind is ValueKind.OUTPUT]
            gpu = []
            for g in self.gpus:
                back = [sum(us) for us in zip(*(self._crossing_us(g, v) for v in results), strict=True)]
                own = (gpu_time(op, w, s, g).us for w, s in zip(works, self.steps, strict=True))
                gpu.append(tuple(us + (back[p] if back else 0.0) for p, us in enumerate(own)))
            self._times[key] = (cpu, tuple(gpu))
        return self._times[key]

    def _new_bytes(self, op: Op, actual: dict[str, str]) -> tuple[int, int]:
        """Bytes of weights and of states that no op before has brought in (tied embeddings count once)."""
        weights = states = 0
        pool = KvPool.of(self.plan.max_dims())
        for name in op.inputs:
            value = self._values.get(actual.get(name, ""))
            if value is None or value.id in self._resident:
                continue
            if value.kind in (ValueKind.WEIGHT, ValueKind.CONST):
                weights += self.context.target.packed_bytes(value)
            elif value.kind is ValueKind.STATE:
                states += pool.gpu_bytes(value.type) if self.gpus else pool.cpu_bytes(value.type)
            else:
                continue
            self._resident.add(value.id)
        return weights, states

    def _expert_set(
        self, index: int, call: Call, template: Template, op: Op, actual: dict[str, str], spine: int
    ) -> ExpertSet:
        a = op.attrs
        assert isinstance(a, ops.MoeExperts)
        size = self._new_bytes(op, actual)[0] // a.experts
        by_share: dict[float, list[int]] = defaultdict(list)
        for expert, part in enumerate(self.context.expert_shares(self._moe_layer, a.experts)):
            by_share[part].append(expert)
        self._moe_layer += 1
        classes = tuple(
            self._expert_class(template, op, part, tuple(members), size)
            for part, members in sorted(by_share.items(), reverse=True)
        )
        x = template.value(op.inputs[0])
        exchange = tuple(
            tuple(handshake_us(g) + 2 * copy_us(g, activation_bytes(x, step)) for step in self.steps) for g in self.gpus
        )
        pin = self._pin(template, op, call.layer)
        if self.context.expert_cache != "static":
            pin = cached_in_cpu_memory(self.context.pins, op, call.layer)
        return ExpertSet(index, op.id, spine, size, classes, exchange, pin)

    def _expert_class(
        self, template: Template, op: Op, share: float, members: tuple[int, ...], size: int
    ) -> ExpertClass:
        a = op.attrs
        assert isinstance(a, ops.MoeExperts)
        chosen = inclusion(share, a.top_k)
        cpu: list[float] = []
        needed: list[float] = []
        gpu: list[list[float]] = [[] for _ in self.gpus]
        stream: list[list[float]] = [[] for _ in self.gpus]
        for step in self.steps:
            whole = work_of(op, template.value_map(), step, self.context.target)
            active = 1.0 - (1.0 - chosen) ** whole.rows
            needed.append(active)
            work = expert_work(op, whole, size, whole.rows * chosen, active)
            us = expert_cpu_us(op, work, step, self.context) * self.largest_share
            cpu.append(us + (self.disk.us(work.weight_bytes) if self.disk else 0.0))
            for i, g in enumerate(self.gpus):
                gpu[i].append(expert_gpu_us(op, work, step, g))
                stream[i].append(active * copy_us(g, size))
        times = tuple(cpu), tuple(map(tuple, gpu)), tuple(map(tuple, stream))
        return ExpertClass(share, members, tuple(needed), *times)
