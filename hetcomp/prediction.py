"""What a plan would take on a machine, for any step: the prediction that runs are held against."""

from __future__ import annotations

from hetcomp.backends.protocol import Isa
from hetcomp.backends.select_kernels import CpuTarget, default_backends
from hetcomp.hardware.profile import HardwareProfile
from hetcomp.ir.annotations import Timeline
from hetcomp.ir.events import Event
from hetcomp.ir.plan import Plan
from hetcomp.passes import simulate
from hetcomp.passes.annotate_cost import cost_plan
from hetcomp.passes.context import Context
from hetcomp.passes.phases import Phase


def predict(plan: Plan, profile: HardwareProfile, step: Phase, isa: str | None = None) -> Timeline:
    """The simulated timeline of one step of a placed and scheduled plan on ``profile``.

    step: number of tokens, sequences and last position. isa: instruction set of the program that runs (None: the
    profile's best).
    """
    context = _context(profile, isa)
    return simulate.timeline(cost_plan(plan, (step,), context), 0, step, context)


def trace(plan: Plan, profile: HardwareProfile, step: Phase, isa: str | None = None) -> tuple[Event, ...]:
    """What every lane does when in that step, as the simulation sees it."""
    context = _context(profile, isa)
    return simulate.trace(cost_plan(plan, (step,), context), 0, step, context)


def _context(profile: HardwareProfile, isa: str | None) -> Context:
    return Context(profile, None, CpuTarget((Isa.AVX2,), default_backends()), isa=isa)
