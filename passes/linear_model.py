"""A mixed-integer linear program put together column by column and solved with HiGHS (scipy)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

# A plan within a thousandth of the best is done; what is left is smaller than any error of the cost model.
RELATIVE_GAP = 1e-3
# A net below searches that do not end (their gap is reported). It is far above what our models take: where it acts, the
# answer depends on the machine's speed.
TIME_LIMIT_S = 20.0


@dataclass(frozen=True)
class Solved:
    """``values`` by column (None: there is no solution), the objective, a bound that no solution is below, and the
    relative gap between them."""

    values: tuple[float, ...] | None
    objective: float
    bound: float
    gap: float
    message: str


@dataclass
class LinearModel:
    """min cost . x with low <= A x <= high; columns are numbered in the order in which they are added."""

    cost: list[float] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    integer: list[int] = field(default_factory=list)
    rows: list[Mapping[int, float]] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    constant: float = 0.0

    def column(self, cost: float = 0.0, upper: float = np.inf, *, lower: float = 0.0, integer: bool = False) -> int:
        """A new variable."""
        self.cost.append(cost)
        self.lower.append(lower)
        self.upper.append(upper)
        self.integer.append(int(integer))
        return len(self.cost) - 1

    def row(self, terms: Mapping[int, float], low: float = -np.inf, high: float = np.inf) -> None:
        """A new constraint."""
        self.rows.append(terms)
        self.low.append(low)
        self.high.append(high)

    def solve(self, gap: float = RELATIVE_GAP) -> Solved:
        """A solution within ``gap`` of the best; deterministic for equal models unless the time limit cuts it off."""
        return self._solve(self.integer, gap)

    def relaxed_bound(self) -> float:
        """The objective without the demand for whole numbers: no solution is below it."""
        return self._solve([0] * len(self.integer), RELATIVE_GAP).objective

    def _solve(self, integer: list[int], relative_gap: float) -> Solved:
        # The constant as a column held at 1: HiGHS's relative gap is then that of the whole objective.
        cost, lower = [*self.cost, self.constant], [*self.lower, 1.0]
        at = [(r, c, v) for r, terms in enumerate(self.rows) for c, v in terms.items()]
        shape = (len(self.rows), len(cost))
        matrix = csr_matrix(([v for *_, v in at], ([r for r, *_ in at], [c for _, c, _ in at])), shape=shape)
        result = milp(
            np.array(cost),
            integrality=np.array([*integer, 0]),
            bounds=Bounds(np.array(lower), np.array([*self.upper, 1.0])),
            constraints=LinearConstraint(matrix, np.array(self.low), np.array(self.high)) if self.rows else (),
            options={"mip_rel_gap": relative_gap, "time_limit": TIME_LIMIT_S},
        )
        if result.x is None:
            return Solved(None, np.inf, np.inf, 0.0, str(result.message))
        objective = float(result.fun)
        found = getattr(result, "mip_dual_bound", None)
        bound = min(objective, float(found if found is not None else result.fun))
        gap = (objective - bound) / objective if objective > 0 else 0.0
        return Solved(tuple(float(x) for x in result.x), objective, bound, gap, str(result.message))
