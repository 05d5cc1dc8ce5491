"""A scheduled plan's step as tasks of lanes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from hetcomp.hardware.figures import Gpu
from hetcomp.ir import ops
from hetcomp.ir.annotations import ExpertPlacement, Placement
from hetcomp.ir.deferral import deferred_role, experts_on_cpu, moe_layers
from hetcomp.ir.homes import number
from hetcomp.ir.plan import Op, Plan, Template, ValueKind
from hetcomp.passes.adapter_time import expert_launches_us, gpu_op_us
from hetcomp.passes.context import Context
from hetcomp.passes.device_time import copy_us, handshake_us, launch_us
from hetcomp.passes.epochs import written_by
from hetcomp.passes.expert_time import expert_cpu_us, expert_gpu_us, expert_work
from hetcomp.passes.lane_engine import Task
from hetcomp.passes.phases import Phase
from hetcomp.passes.placement_problem import STAGED_EXPERTS
from hetcomp.passes.routing import ReplayedStep, sample_deferral
from hetcomp.passes.step_placement import by_device, kinds_of_devices, lane_shares, moved_to, with_cached
from hetcomp.passes.streamed_step import StreamedStep
from hetcomp.passes.work import Work, activation_bytes, work_of


@dataclass(frozen=True, slots=True)
class _Use:
    """An op of a call, with the plan-wide names of the values that it reads and writes, states among them."""

    template: Template
    op: Op
    placement: Placement
    layer: int | None
    read: tuple[str, ...]
    written: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _CpuExperts:
    """Of one MoE layer what CPU nodes compute at a time: microseconds of one node for all of it, and bytes of weights
    that it reads."""

    us: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    read: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def __bool__(self) -> bool:
        return any(self.us.values())


class StepTasks:
    """Tasks of one step; MoE layers whose experts live on several devices (or whose popularity is known) take their
    numbers of tokens from a routing drawn with ``seed``."""

    def __init__(self, plan: Plan, phase: int, step: Phase, context: Context) -> None:
        self.plan, self.phase, self.step, self.context = plan, phase, step, context
        self.profile = context.profile
        self._works: dict[tuple[str, str], Work] = {}
        self._expert_us: dict[tuple[str, str, int, str], float] = {}
        self._sizes: dict[tuple[str, str], float] = {}
        self._gpu_us: dict[tuple[str, str, str], float] = {}
        self._steps = list(self._uses())
        handing = (number for number, layer in enumerate(moe_layers(plan)) if layer.hands_over)
        self._spines = dict(zip(handing, plan.stream.spines_us, strict=True)) if plan.stream is not None else {}

    def _uses(self) -> Iterator[_Use]:
        for index, call in enumerate(self.plan.calls):
            template = self.plan.template(call.template)
            values = template.value_map()
            names = dict(zip((*template.params, *template.results), (*call.args, *call.results), strict=True))
            placements = dict(call.placements)
            for op in template.ops:
                read, written = (
                    tuple(names.get(name, f"{index}.{name}") for name in some)
                    for some in (op.inputs, sorted(written_by(op, values)))
                )
                yield _Use(template, op, placements[op.id], call.layer, read, written)

    def tasks(self, seed: int, replayed: ReplayedStep | None = None) -> list[Task]:
        """The step's tasks in program order; ``replayed``: with this routing, of which nothing is deferred."""
        self._replayed = replayed
        self._tasks: list[Task] = list(self._cache_copies(replayed.copied_bytes)) if replayed is not None else []
        self._ready: dict[str, tuple[int, ...]] = defaultdict(tuple)
        self._streamed: dict[str, list[int]] = defaultdict(list)
        self._streams: dict[str, StreamedStep] = {}
        self._routed: dict[str, tuple[int, ...]] = defaultdict(tuple)  # of the streamed layer before
        self._moe_layer = self._cached_layer = 0
        self._left = False  # the MoE layer before has deferred experts
        generator = np.random.default_rng(seed)
        for use in self._steps:
            after = tuple({t for name in use.read for t in self._ready[name]})
            done = self._op(use.template, use.op, use.placement, use.layer, after, generator)
            for name in use.written:
                self._ready[name] = done
        return self._tasks

    def _cache_copies(self, moved: int) -> Iterator[Task]:
        """What the expert cache copies under the step, which waits for it in the end."""
        if moved:
            assert self.plan.expert_cache is not None
            (slots,) = self.plan.expert_cache.gpus  # of several GPUs no trace is replayed
            us = copy_us(self._gpu(slots.gpu), float(moved))
            yield Task("expert cache", None, f"{slots.gpu} copy weights", us, (), moved / us / 1e3, link=slots.gpu)

    def _add(
        self,
        op: Op,
        layer: int | None,
        lane: str,
        us: float,
        after: tuple[int, ...],
        gb_per_s: float = 0.0,
        *,
        deferred: bool = False,
        link: str = "",
    ) -> tuple[int, ...]:
        role, moe = op.role or op.kind, self._moe_layer - 1 if isinstance(op.attrs, ops.MoeExperts) else None
        role = deferred_role(role) if deferred else role
        self._tasks.append(Task(role, layer, lane, us, after, gb_per_s, moe, link))
        return (len(self._tasks) - 1,)

    def _op(
        self,
        template: Template,
        op: Op,
        placement: Placement,
        layer: int | None,
        after: tuple[int, ...],
        generator: np.random.Generator,
    ) -> tuple[int, ...]:
        moved = moved_to(self.plan, placement, self.step)
        if isinstance(op.attrs, ops.Transfer):
            return after if moved else self._transfer(template, op, layer, after)
        if moved:
            return self._gpu_op(template, op, Placement(moved, streamed=True), layer, after)
        if isinstance(op.attrs, ops.MoeExperts):
            self._moe_layer += 1
            if self.context.statistics is not None or kinds_of_devices(placement) != {"cpu"}:
                return self._experts(template, op, placement, layer, after, generator)
        if placement.device.startswith("gpu:"):
            return self._gpu_op(template, op, placement, layer, after)
        assert op.cost is not None
        return self._cpu_op(op, placement, layer, op.cost.phases[self.phase].us, after)

    def _cpu_op(
        self, op: Op, placement: Placement, layer: int | None, us: float, after: tuple[int, ...]
    ) -> tuple[int, ...]:
        """On the lanes of all nodes that own a part of it; an op's time is that of one node for all of it."""
        meet = op.schedule is not None and op.schedule.barrier_before
        barrier = self.profile.barrier_us * self.profile.calibration("barrier")
        shares = lane_shares(placement)
        # The partial sums of experts that are cut over nodes are added after one more barrier.
        barrier *= meet + (len(shares) > 1 and isinstance(op.attrs, ops.MoeExperts))
        took, moved = us * max(shares.values()) + barrier, 0.0
        if op.cost is not None:
            cost = op.cost.phases[self.phase]
            moved = cost.weight_bytes + cost.act_bytes + cost.state_bytes
            after = self._from_disk(op, layer, cost.weight_bytes, after)
        done: list[int] = []
        for lane, share in shares.items():
            rate = min(moved * share / took / 1e3, self.profile.bandwidth(int(lane[4:]))) if took else 0.0
            done += self._add(op, layer, lane, took, after, rate)
        return tuple(done)

    def _gpu_op(
        self, template: Template, op: Op, placement: Placement, layer: int | None, after: tuple[int, ...]
    ) -> tuple[int, ...]:
        work, key = self._work(template, op), (template.name, op.id, placement.device)
        if key not in self._gpu_us:
            self._gpu_us[key] = gpu_op_us(template, op, work, self.step, self._gpu(key[2]), self.context.adapted_rank)
        us = self._gpu_us[key]
        if placement.streamed and work.weight_bytes:
            return self._stream(op, layer, placement.device, ((work.weight_bytes, ()),), us, after)
        return self._add(op, layer, placement.device, us, after)

    def _stream(
        self,
        op: Op,
        layer: int | None,
        device: str,
        copies: tuple[tuple[float, tuple[int, ...]], ...],
        us: float,
        after: tuple[int, ...],
    ) -> tuple[int, ...]:
        """Copies of weights into one of two buffers, which wait for the work that read that buffer before and each for
        what it is decided by, and the work on them. Activations have queues of their own (mapped memory), so that they
        never wait for weights."""
        before = self._streamed[device][-2:-1]
        copied: tuple[int, ...] = ()
        for moved, decided in copies:
            if moved:
                copy = copy_us(self._gpu(device), moved)
                lane = f"{device} copy weights"
                copied = self._add(op, layer, lane, copy, (*before, *decided), moved / copy / 1e3, link=device)
        done = self._add(op, layer, device, us, (*after, *copied))
        self._streamed[device] += done
        return done

    def _transfer(self, template: Template, op: Op, layer: int | None, after: tuple[int, ...]) -> tuple[int, ...]:
        """Out of the GPU that has it, into the one that reads it: from one to another it is both, through the host."""
        assert isinstance(op.attrs, ops.Transfer)
        moved = activation_bytes(template.value(op.inputs[0]), self.step)
        for device, direction in ((op.attrs.source, "out"), (op.attrs.target, "in")):
            if device.startswith("gpu:"):
                gpu = self._gpu(device)
                us = handshake_us(gpu) / 2 + copy_us(gpu, moved)
                after = self._activations(op, layer, device, direction, us, after)
        return after

    def _activations(
        self, op: Op, layer: int | None, device: str, direction: str, us: float, after: tuple[int, ...]
    ) -> tuple[int, ...]:
        """They cross in queues of their own, but into a GPU over the link that copies of weights use."""
        return self._add(op, layer, f"{device} copy {direction}", us, after, link=device if direction == "in" else "")

    def _experts(
        self,
        template: Template,
        op: Op,
        placement: Placement,
        layer: int | None,
        after: tuple[int, ...],
        generator: np.random.Generator,
    ) -> tuple[int, ...]:
        a = op.attrs
        assert isinstance(a, ops.MoeExperts)
        shares = self.context.expert_shares(self._moe_layer - 1, a.experts)
        # Only generated tokens are deferred: a decode step has one of every sequence.
        deferred = placement.deferred if self.step.tokens == self.step.sequences else 0
        rows = self._work(template, op).rows
        on_cpu = np.array(experts_on_cpu(placement))
        if self._replayed is None:
            tokens, later = sample_deferral(shares, a.top_k, rows, on_cpu, deferred, generator)
        else:
            tokens = self._replayed.tokens(self._moe_layer - 1, a.experts)
            later = np.zeros_like(tokens)
        size = self._expert_bytes(template, op)
        if self.plan.expert_cache is not None and placement.device.startswith("gpu:"):
            placement = with_cached(placement, self._held())
            self._cached_layer += 1
        ahead = 0
        stream, spine_us = self.plan.stream, self._spines.get(self._moe_layer - 1)
        if stream is not None and spine_us is not None and self.step.tokens != self.step.sequences:
            of_gpu = self._streams.setdefault(placement.device, StreamedStep(stream, self.step.tokens))
            placement, ahead = of_gpu.layer(placement, a, tokens, size, spine_us)
        done: list[int] = []
        at_once, left = _CpuExperts(), _CpuExperts()
        homes = by_device(placement, self.step)
        for device, runs in homes.items():
            for work, drawn in ((at_once, tokens - later), (left, later)) if device.startswith("cpu:") else ():
                mine = np.concatenate([drawn[r.first : r.last + 1] for r in runs])
                work.us[device] += self._sum_us(template, op, mine, size, device)
                work.read[device] += size * float(np.count_nonzero(mine))
        asked = self._ask_cpu(op, placement, layer, at_once, left, after)
        for device, runs in homes.items():
            if device.startswith("gpu:"):
                done += self._gpu_experts(template, op, device, runs, tokens, size, layer, after, placement, ahead)
        done += self._cpu_experts(op, placement, layer, at_once, left, after, asked)
        self._left = deferred > 0
        return tuple(done)

    def _held(self) -> Sequence[int]:
        """What the slots of the cached layer hold: what they begin with, or in the step that is replayed."""
        assert self.plan.expert_cache is not None
        if self._replayed is not None and self._replayed.held is not None:
            return [int(e) for e in np.flatnonzero(self._replayed.held[self._cached_layer])]
        return self.plan.expert_cache.first[self._cached_layer]

    def _gpu_experts(
        self,
        template: Template,
        op: Op,
        device: str,
        runs: list[ExpertPlacement],
        tokens: NDArray[np.int64],
        size: float,
        layer: int | None,
        after: tuple[int, ...],
        placement: Placement,
        ahead: int,
    ) -> tuple[int, ...]:
        mine = [tokens[r.first : r.last + 1] for r in runs if r.device == device]
        streamed = [tokens[r.first : r.last + 1] for r in runs if r.device != device]
        resident, passing = (np.concatenate([*parts, tokens[:0]]) for parts in (mine, streamed))
        if not resident.any() and not passing.size:
            return after
        if placement.device != device:
            after = self._cross(op, layer, device, "in", after)
        us, done = expert_launches_us(self._gpu(device), self.context.adapted_rank), after
        if resident.any():
            # While they are computed the first of the others arrive.
            done = self._add(op, layer, device, us + self._sum_us(template, op, resident, size, device), after)
            us = 0.0
        wave = self.plan.stream.slots if self.plan.stream is not None else STAGED_EXPERTS
        for start in range(0, passing.size, wave):
            part = passing[start : start + wave]
            work = us + self._sum_us(template, op, part, size, device)
            early = min(part.size, max(0, ahead - start))
            copies = ((early * size, self._routed[device]), ((part.size - early) * size, after))
            done = self._stream(op, layer, device, copies, work, after)
            us = 0.0
        if passing.size:
            self._routed[device] = after
        return self._cross(op, layer, device, "out", done) if placement.device != device else done

    def _ask_cpu(
        self,
        op: Op,
        placement: Placement,
        layer: int | None,
        at_once: _CpuExperts,
        left: _CpuExperts,
        after: tuple[int, ...],
    ) -> tuple[int, ...] | None:
        """The hand-over of the input to the CPU's experts; None: there is none. In the GPU's line of launches stand one
        that writes the input, one that reads the sum, and two nodes between them, whatever runs meanwhile. Graphs have
        them also for layers in which no token chose the CPU's experts, but those of prompts that may stream."""
        chosen = at_once or left or self._left
        asks = self.plan.stream is None or self.step.tokens == self.step.sequences
        if not placement.device.startswith("gpu:") or not at_once.us or not (chosen or asks):
            return None
        gpu = self._gpu(placement.device)
        us = handshake_us(gpu) + 2 * launch_us(gpu) + self._crossing_us(op, gpu)
        return self._add(op, layer, placement.device, us, after)

    def _cpu_experts(
        self,
        op: Op,
        placement: Placement,
        layer: int | None,
        at_once: _CpuExperts,
        left: _CpuExperts,
        after: tuple[int, ...],
        asked: tuple[int, ...] | None,
    ) -> tuple[int, ...]:
        """What is deferred is computed after the answer; the lane's next task waits for it."""
        if asked is None and not (at_once or left or self._left):
            return after if not at_once.us else ()
        after = after if asked is None else asked
        done = self._on_nodes(op, placement, layer, at_once, after, adds=self._left) or after
        if asked is not None:
            us = self._crossing_us(op, self._gpu(placement.device))
            done = self._activations(op, layer, placement.device, "in", us, done)
        if left:
            self._on_nodes(op, placement, layer, left, after, deferred=True)
        return done

    def _on_nodes(
        self,
        op: Op,
        placement: Placement,
        layer: int | None,
        work: _CpuExperts,
        after: tuple[int, ...],
        *,
        adds: bool = False,
        deferred: bool = False,
    ) -> tuple[int, ...]:
        """On the lanes of the nodes that have anything to do; or of all where what the layer before deferred is added,
        behind one more barrier (``adds``), or a GPU is answered: threads meet for its input and before that (lane.h).
        """
        after = self._from_disk(op, layer, sum(work.read.values()), after)
        slices = lane_shares(replace(placement, experts=())) if len(placement.slices) > 1 else None
        done: list[int] = []
        away = placement.device.startswith("gpu:") and not deferred
        for device, took in work.us.items():
            if took <= 0 and not (adds or away):
                continue
            lanes = slices if slices and len(work.us) == 1 else {device: 1.0}
            whole = took * max(lanes.values()) + self.profile.barrier_us * (1 + adds + away)
            for lane, share in lanes.items():
                rate = min(work.read[device] * share / whole / 1e3, self.profile.bandwidth(int(lane[4:])))
                done += self._add(op, layer, lane, whole, after, rate, deferred=deferred)
        return tuple(done)

    def _from_disk(self, op: Op, layer: int | None, wanted: float, after: tuple[int, ...]) -> tuple[int, ...]:
        """What is missing of ``wanted`` bytes of chosen experts is read before they are computed."""
        if self.plan.disk is None or not isinstance(op.attrs, ops.MoeExperts) or not wanted:
            return after
        return self._add(op, layer, "disk", self.plan.disk.us(wanted), after)

    def _cross(self, op: Op, layer: int | None, device: str, direction: str, after: tuple[int, ...]) -> tuple[int, ...]:
        """Half of a hand-shake and the activations of the step."""
        us = handshake_us(self._gpu(device)) / 2 + self._crossing_us(op, self._gpu(device))
        return self._activations(op, layer, device, direction, us, after)

    def _crossing_us(self, op: Op, gpu: Gpu) -> float:
        assert isinstance(op.attrs, ops.MoeExperts)
        return copy_us(gpu, 4.0 * op.attrs.hidden * self.step.tokens)

    def _sum_us(self, template: Template, op: Op, tokens: NDArray[np.int64], size: float, device: str) -> float:
        counts = np.bincount(tokens).tolist()
        return float(sum(c * self._one_expert(template, op, n, size, device) for n, c in enumerate(counts) if n and c))

    def _one_expert(self, template: Template, op: Op, tokens: int, size: float, device: str) -> float:
        if (key := (template.name, op.id, tokens, device)) not in self._expert_us:
            work = expert_work(op, self._work(template, op), size, float(tokens))
            if device.startswith("cpu:"):
                us = expert_cpu_us(op, work, self.step, self.context)
            else:
                us = expert_gpu_us(op, work, self.step, self._gpu(device), self.context.adapted_rank)
            self._expert_us[key] = us
        return self._expert_us[key]

    def _expert_bytes(self, template: Template, op: Op) -> float:
        a = op.attrs
        assert isinstance(a, ops.MoeExperts)
        if (key := (template.name, op.id)) not in self._sizes:
            values = [template.value(name) for name in op.inputs]
            whole = sum(self.context.target.packed_bytes(v) for v in values if v.kind is ValueKind.WEIGHT)
            self._sizes[key] = whole / a.experts
        return self._sizes[key]

    def _work(self, template: Template, op: Op) -> Work:
        if (key := (template.name, op.id)) not in self._works:
            self._works[key] = work_of(op, template.value_map(), self.step, self.context.target)
        return self._works[key]

    def _gpu(self, device: str) -> Gpu:
        return self.profile.gpus[number(device)]
