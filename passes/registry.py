"""How a pass declares what it needs and what holds after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hetcomp.ir.plan import Plan
from hetcomp.passes.context import Context

PassFunction = Callable[[Plan, Context], Plan]


@dataclass(frozen=True)
class PlanPass:
    """A pure function on plans with its contract. ``requires`` and ``establishes`` are names of invariants that
    ``hetcomp.ir.verifier`` can check."""

    name: str
    requires: frozenset[str]
    establishes: frozenset[str]
    function: PassFunction

    def __call__(self, plan: Plan, context: Context) -> Plan:
        """Runs the pass and records what now holds."""
        done = self.function(plan, context)
        return replace(done, established=(*done.established, *sorted(self.establishes - set(done.established))))


def plan_pass(
    *, requires: tuple[str, ...] = (), establishes: tuple[str, ...] = ()
) -> Callable[[PassFunction], PlanPass]:
    """Declares a pass; its name is the function's."""

    def declare(function: PassFunction) -> PlanPass:
        return PlanPass(function.__name__, frozenset(requires), frozenset(establishes), function)

    return declare
