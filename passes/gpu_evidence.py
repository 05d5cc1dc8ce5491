"""What the predicted times of each GPU rest on: measured curves of kernels, or bandwidth and rates alone."""

from __future__ import annotations

from collections import defaultdict

from hetcomp.ir.plan import Plan
from hetcomp.passes.context import Context
from hetcomp.passes.device_time import gpu_curve, term_of
from hetcomp.passes.phases import phases
from hetcomp.passes.work import work_of


def gpu_evidence(plan: Plan, context: Context) -> tuple[str, ...]:
    """A note for every GPU that the placed plan uses."""
    steps = [step for step in phases(plan) if step.steps > 0]
    measured: dict[str, set[str]] = defaultdict(set)
    estimated: dict[str, set[str]] = defaultdict(set)
    seen: set[tuple[str, str, str]] = set()
    for call in plan.calls:
        template = plan.template(call.template)
        placements = dict(call.placements)
        for op in template.ops:
            place = placements[op.id]
            homes = [run.streamed_to or run.device for run in place.experts] or [place.device]
            for device in {d for d in homes if d.startswith("gpu:")}:
                if (template.name, op.id, device) in seen:
                    continue
                seen.add((template.name, op.id, device))
                values = template.value_map()
                for step in steps:
                    work = work_of(op, values, step, context.target)
                    term = term_of(op, step)
                    form = work.state_format if term.startswith("attention") else work.weight_format
                    gpu = context.profile.gpus[int(device.partition(":")[2])]
                    by_curve = gpu_curve(gpu, op, work, step) is not None
                    (measured if by_curve else estimated)[device].add(
                        term if term == "elementwise" else f"{term} {form}"
                    )
    notes = []
    for device in sorted(measured.keys() | estimated.keys()):
        gpu = context.profile.gpus[int(device.partition(":")[2])]
        curves = f"{', '.join(sorted(measured[device]))} by measured curves; " if measured[device] else ""
        rest = f"{', '.join(sorted(estimated[device]))} estimated" if measured[device] else "all times are estimated"
        notes.append(f"{device} ({gpu.name}): {curves}{rest} from its bandwidth and rates ({gpu.source.value})")
    return tuple(notes)
