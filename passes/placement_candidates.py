"""The placements that are simulated before one is chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hetcomp.passes.linear_model import Solved
from hetcomp.passes.placement_assignment import Assignment, assignment_us, fits, small_ones_at_neighbours
from hetcomp.passes.placement_blocks import gpus_in_order, in_order, join_layers
from hetcomp.passes.placement_greedy import cpu_only, greedy, topped_up
from hetcomp.passes.placement_milp import PlacementModel
from hetcomp.passes.placement_problem import Problem
from hetcomp.passes.placement_spread import spread

MILP, GREEDY, GPU_FIRST, CPU_ONLY, SPREAD = "MILP", "greedy", "GPU first", "CPU only", "layers over GPUs"
ROUTERS_FIRST = "MILP, routers on GPUs"


@dataclass(frozen=True)
class Proposals:
    """``assignments``: by method, only such as fit. ``solver``: what found the first of them, whose time in the linear
    model is ``objective_us``; no placement is faster there than ``bound_us``. ``greedy_us``: greedy's, whether it
    fits or not. ``message``: HiGHS's, where nothing fits."""

    assignments: tuple[tuple[str, Assignment], ...]
    solver: str
    objective_us: float
    bound_us: float
    greedy_us: float
    message: str

    @property
    def gap(self) -> float:
        """(objective - bound) / objective."""
        return (self.objective_us - self.bound_us) / self.objective_us if self.objective_us > 0 else 0.0


def propose(problem: Problem) -> Proposals:
    """The MILP's placement; the same with all routers on GPUs, where experts could come to them in prompts; greedy's;
    everything that fits on the GPUs, by what it gains there, or by layers where there are several; all on the CPU.

    The MILP is optimal in a linear model that adds layers up and knows routings by their means. The simulation, which
    does neither, is what they are compared by: hence the simpler ones beside it.
    """
    solved_for, solved, bound = _solve(problem)
    by_gain = greedy(problem)
    others = [(MILP, solved_for), (GREEDY, by_gain), (GPU_FIRST, greedy(problem, whatever=True))]
    with_routers = _routers_on_gpus(problem)
    if with_routers is not None and not (solved_for is not None and fits(with_routers, solved_for)):
        others.append((ROUTERS_FIRST, _solve(with_routers)[0]))
    others += [(SPREAD, found) for found in spread(problem)]
    others.append((CPU_ONLY, cpu_only(problem)))
    fitting = [(name, _tidied(problem, a)) for name, a in others if a is not None and fits(problem, a)]
    if not fitting and len(problem.node_share) > 1:
        # The cut over the nodes does not fit; whole experts on single nodes may.
        found, solved = PlacementModel(problem, whole_nodes=True).solve()
        fitting = [(MILP, found)] if found is not None else []
        bound = solved.bound
    objective = assignment_us(problem, fitting[0][1]) if fitting else float("inf")
    return Proposals(
        assignments=tuple(fitting),
        solver="HiGHS" if fitting and fitting[0][0] == MILP else "greedy",
        objective_us=objective,
        bound_us=min(objective, bound),
        greedy_us=assignment_us(problem, by_gain),
        message=solved.message,
    )


def by_rule(problem: Problem) -> list[Assignment]:
    """What fits on the GPUs by what it gains there, the best kind first: with routers, without, and nothing."""
    kinds = (_routers_on_gpus(problem) or problem, problem)
    return [*(_tidied(problem, greedy(kind, whatever=True)) for kind in kinds), cpu_only(problem)]


def _solve(problem: Problem) -> tuple[Assignment | None, Solved, float]:
    """The MILP's placement (None: nothing fits), what HiGHS says of it, and what no placement is faster than."""
    blocks = join_layers(problem)
    model = PlacementModel(blocks.problem)
    found, solved = model.solve()
    bound = solved.bound if blocks.problem is problem else model.model.relaxed_bound()
    return in_order(problem, topped_up(problem, blocks.expand(found))) if found is not None else None, solved, bound


def _routers_on_gpus(problem: Problem) -> Problem | None:
    """The problem with the makers of all experts' input pinned to GPUs, None where nothing is streamed to these.

    Only experts whose input a GPU makes are streamed in prompts, which the linear model does not know: where not all
    dense weights fit it leaves the routers, whose bytes gain least in decode, to the CPU, and no prompt streams."""
    if not problem.spread:
        return None
    spines = {e.spine for e in problem.experts if e.pin in (None, "cpu")}
    pin = "gpu" if sum(size > 0 for size in problem.gpu_bytes) > 1 else "gpu:0"
    groups = (replace(g, pin=pin) if i in spines and g.pin is None else g for i, g in enumerate(problem.groups))
    return replace(problem, groups=tuple(groups))


def _tidied(problem: Problem, assignment: Assignment) -> Assignment:
    """Without needless transfers, spread where that is wanted, and on alike GPUs in order; without moves where those
    would not fit."""
    moved = small_ones_at_neighbours(problem, assignment)
    moved = in_order(problem, moved) if problem.spread else moved
    return gpus_in_order(problem, moved if fits(problem, moved) else assignment)
