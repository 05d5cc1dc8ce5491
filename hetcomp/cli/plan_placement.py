"""The parts of the plan's report that speak of several devices: layers, memory by device, what the solver found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from hetcomp.backends.packing import packed_bytes
from hetcomp.hardware.profile import HardwareProfile
from hetcomp.ir.annotations import Placement, Solution
from hetcomp.ir.plan import Call, Op, Plan, ValueKind


def uses_gpus(plan: Plan) -> bool:
    """Whether anything of the plan is on a GPU."""
    return any(device.startswith("gpu") for call in plan.calls for _, p in call.placements for device in _devices(p))


def critical_lines(plan: Plan) -> Text:
    """The critical path of each phase by name, longest first."""
    lines = []
    for timeline in plan.timelines:
        if timeline.critical:
            whole = max(timeline.total_us, 1e-9)
            parts = ", ".join(f"{name} {us / whole:.0%}" for name, us in timeline.critical[:4])
            lines.append(f"{timeline.phase} waits for: {parts}")
    return Text("\n".join(lines))


def solution_line(plan: Plan, solution: Solution) -> str:
    """The solver's answer in a sentence."""
    mix = plan.mix
    what = f"prompt {mix.prompt}, answer {mix.answer}, batch {mix.batch}" if mix else "the default mix"
    greedy = solution.greedy_us / solution.objective_us - 1.0 if solution.objective_us else 0.0
    return (
        f"placement for {what}: {solution.method}, {solution.objective_us / 1e6:.2f} s, optimality gap "
        f"{solution.gap:.2%}; greedy {greedy:+.1%}; experts chosen: {solution.statistics}"
    )


def layer_table(plan: Plan) -> Table:
    """One line a run of layers that are placed alike."""
    table = Table(title="Layers", title_justify="left")
    table.add_column("layers", no_wrap=True)
    table.add_column("attention, dense", no_wrap=True)
    table.add_column("experts")
    for layers, dense, experts in layer_runs(plan):
        table.add_row(layers, dense, experts)
    return table


def device_memory_table(plan: Plan, profile: HardwareProfile | None) -> Table:
    """Bytes of weights and KV cache at their homes."""
    table = Table(title="Memory by device", title_justify="left")
    table.add_column("device", no_wrap=True)
    for name in ("weights", "KV cache", "sum", "free"):
        table.add_column(name, justify="right", no_wrap=True)
    weights, states = device_bytes(plan)
    for device in sorted({*weights, *states}):
        free = _free(device, profile)
        sizes = (weights[device], states[device], weights[device] + states[device])
        table.add_row(device, *(f"{s / 2**30:.2f} GiB" for s in sizes), f"{free / 2**30:.1f} GiB" if free else "–")
    return table


def device_bytes(plan: Plan) -> tuple[Counter[str], Counter[str]]:
    """Bytes of packed weights and of states by the device whose memory is their home; CPU weights that are cut over
    nodes are counted at each node's part."""
    weights: Counter[str] = Counter()
    states: Counter[str] = Counter()
    values, seen = plan.value_map(), set()
    for call, op, placement in _placed(plan):
        actual = dict(zip(plan.template(call.template).params, call.args, strict=True))
        for name in op.inputs:
            value = values.get(actual.get(name, ""))
            if value is None or value.id in seen:
                continue
            if value.kind in (ValueKind.WEIGHT, ValueKind.CONST):
                seen.add(value.id)
                for device, share in _homes(op, placement).items():
                    weights[device] += int(packed_bytes(value) * share)
            elif value.kind is ValueKind.STATE:
                seen.add(value.id)
                states[placement.device] += value.type.bytes(plan.max_dims())
    return weights, states


def _homes(op: Op, placement: Placement) -> dict[str, float]:
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


def _free(device: str, profile: HardwareProfile | None) -> int:
    if profile is None:
        return 0
    kind, _, number = device.partition(":")
    if kind == "cpu":
        return profile.node(int(number)).available_bytes
    gpu = profile.gpus[int(number)]
    return gpu.memory_bytes if gpu.free_bytes is None else gpu.free_bytes


def layer_runs(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """Layers, devices of attention and dense ops, and of experts: one entry a run of layers that are placed alike."""
    runs: list[tuple[int, int, str, str]] = []
    for call in plan.calls:
        if call.layer is None:
            continue
        dense, experts = _describe(plan, call)
        if runs and runs[-1][2:] == (dense, experts) and runs[-1][1] == call.layer - 1:
            runs[-1] = (runs[-1][0], call.layer, dense, experts)
        else:
            runs.append((call.layer, call.layer, dense, experts))
    for first, last, dense, experts in runs:
        yield (str(first) if first == last else f"{first}-{last}"), dense, experts


def _describe(plan: Plan, call: Call) -> tuple[str, str]:
    dense: Counter[str] = Counter()
    experts: Counter[str] = Counter()
    for _, op, placement in _placed(plan, call):
        if op.kind == "moe_experts":
            for run in placement.experts:
                streamed = f", in prefill streamed to {run.streamed_to}" if run.streamed_to else ""
                experts[run.device + streamed] += run.last - run.first + 1
        elif op.kind in ("linear", "attention", "head_linear"):
            dense[placement.device + (" (streamed)" if placement.streamed else "")] += 1
    spelled = ", ".join(f"{n} on {device}" for device, n in sorted(experts.items()))
    return ", ".join(device for device, _ in dense.most_common()), spelled or "–"


def _placed(plan: Plan, only: Call | None = None) -> Iterator[tuple[Call, Op, Placement]]:
    for call in plan.calls if only is None else (only,):
        placements = dict(call.placements)
        for op in plan.template(call.template).ops:
            if op.id in placements:
                yield call, op, placements[op.id]


def _devices(placement: Placement) -> Iterator[str]:
    yield placement.device
    yield from (run.device for run in placement.experts)
