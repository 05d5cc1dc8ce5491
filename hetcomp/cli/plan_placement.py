"""The parts of the plan's report that speak of several devices: layers, memory by device, what the solver found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rich.text import Text

from hetcomp.backends.packing import packed_bytes
from hetcomp.ir.annotations import Placement, Solution
from hetcomp.ir.kv_pool import KvPool
from hetcomp.ir.plan import Call, Op, Plan, ValueKind


def critical_lines(plan: Plan) -> Text:
    """The critical path of each phase by name, longest first."""
    lines = []
    for timeline in plan.timelines:
        if timeline.critical:
            whole = max(timeline.total_us, 1e-9)
            parts = ", ".join(f"{name} {us / whole:.0%}" for name, us in timeline.critical[:4])
            lines.append(f"{timeline.phase} waits for: {parts}")
    return Text("\n".join(lines))


def solution_line(plan: Plan, solution: Solution, seconds: float | None = None) -> str:
    """The candidates by simulated time of the mix, and the solver's answer, in a sentence each; ``seconds``: what
    finding and simulating them took."""
    mix = plan.mix
    what = f"prompt {mix.prompt}, answer {mix.answer}, batch {mix.batch}" if mix else "the default mix"
    greedy = solution.greedy_us / solution.objective_us - 1.0 if solution.objective_us else 0.0
    by_time = sorted(solution.candidates, key=lambda c: c.mix_us)
    simulated = ", ".join(f"{c.method} {_seconds(c.mix_us)}" for c in by_time)
    return (
        f"placement for {what}, simulated: {simulated}; chosen: {solution.chosen}. "
        f"{solution.method}: {_seconds(solution.objective_us)} in its linear model, "
        f"optimality gap {solution.gap:.2%}; greedy {greedy:+.1%}; experts chosen: {solution.statistics}"
        + (f"; found in {seconds:.1f} s" if seconds is not None else "")
    )


def _seconds(us: float) -> str:
    return f"{us / 1e6:.2f} s" if us >= 1e4 else f"{us / 1e3:.3f} ms"


def device_bytes(plan: Plan, only: Call | None = None) -> tuple[Counter[str], Counter[str]]:
    """Bytes of packed weights and of states by the device whose memory is their home; CPU weights that are cut over
    nodes are counted at each node's part. ``only``: of that call alone."""
    weights: Counter[str] = Counter()
    states: Counter[str] = Counter()
    values, seen, pool = plan.value_map(), set(), KvPool.of(plan.max_dims())
    for call, op, placement in placed_ops(plan, only):
        actual = dict(zip(plan.template(call.template).params, call.args, strict=True))
        for name in op.inputs:
            value = values.get(actual.get(name, ""))
            if value is None or value.id in seen:
                continue
            if value.kind in (ValueKind.WEIGHT, ValueKind.CONST):
                seen.add(value.id)
                for device, share in homes(op, placement).items():
                    weights[device] += int(packed_bytes(value) * share)
            elif value.kind is ValueKind.STATE:
                seen.add(value.id)
                states[placement.device] += pool.bytes(value.type, placement.device)
    return weights, states


def homes(op: Op, placement: Placement) -> dict[str, float]:
    """Devices in whose memory the op's weights live, and their parts."""
    homes: Counter[str] = Counter()
    if placement.experts:
        total = sum(run.last - run.first + 1 for run in placement.experts)
        for run in placement.experts:
            homes[run.device] += (run.last - run.first + 1) / total  # type: ignore[assignment]
    else:
        homes["cpu:0" if placement.streamed else placement.device] = 1
    found: dict[str, float] = {}
    extent = placement.slices[-1].stop if placement.slices else 0
    for device, share in homes.items():
        if device.startswith("cpu:") and len(placement.slices) > 1:
            for piece in placement.slices:
                node = f"cpu:{piece.node}"
                found[node] = found.get(node, 0.0) + share * (piece.stop - piece.start) / extent
        else:
            found[device] = found.get(device, 0.0) + share
    return found


@dataclass(frozen=True)
class LayerRun:
    """Layers ``first`` .. ``last`` that are placed alike: devices of attention and dense ops, of experts, and bytes of
    weights and KV cache by device, of the run as a whole."""

    first: int
    last: int
    dense: str
    experts: str
    bytes: tuple[tuple[str, int], ...]

    @property
    def layers(self) -> str:
        """``3`` or ``0-47``."""
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


def layer_runs(plan: Plan) -> list[LayerRun]:
    """The layers in order, neighbours that are placed alike joined."""
    runs: list[LayerRun] = []
    for call in plan.calls:
        if call.layer is None:
            continue
        weights, states = device_bytes(plan, call)
        sizes = weights + states
        dense, experts = _describe(plan, call)
        last = runs[-1] if runs else None
        if last is not None and (last.dense, last.experts, last.last) == (dense, experts, call.layer - 1):
            sizes += Counter(dict(last.bytes))
            runs[-1] = replace(last, last=call.layer, bytes=tuple(sorted(sizes.items())))
        else:
            runs.append(LayerRun(call.layer, call.layer, dense, experts, tuple(sorted(sizes.items()))))
    return runs


def _describe(plan: Plan, call: Call) -> tuple[str, str]:
    dense: Counter[str] = Counter()
    experts: Counter[str] = Counter()
    for _, op, placement in placed_ops(plan, call):
        if op.kind == "moe_experts":
            for run in placement.experts:
                streamed = f", in prefill streamed to {run.streamed_to}" if run.streamed_to else ""
                experts[run.device + streamed] += run.last - run.first + 1
        elif op.kind in ("linear", "attention", "head_linear"):
            moved = f" (in prompts {placement.in_prompts})" if placement.in_prompts else ""
            dense[placement.device + (" (streamed)" if placement.streamed else moved)] += 1
    spelled = ", ".join(f"{n} on {device}" for device, n in sorted(experts.items()))
    return ", ".join(device for device, _ in dense.most_common()), spelled or "–"


def placed_ops(plan: Plan, only: Call | None = None) -> Iterator[tuple[Call, Op, Placement]]:
    """Ops that have a placement, call by call."""
    for call in plan.calls if only is None else (only,):
        placements = dict(call.placements)
        for op in plan.template(call.template).ops:
            if op.id in placements:
                yield call, op, placements[op.id]
