"""Runs an artifact with the routing of a trace, for benchmarks: random tokens route uniformly, which text does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hetcomp.errors import HetcompError
from hetcomp.executable import Executable
from hetcomp.ir.deferral import moe_layers
from hetcomp.ir.homes import CPU, memory_of
from hetcomp.ir.plan import Plan
from hetcomp.record_routing import record_text
from hetcomp.routing_trace import RoutingTrace
from hetcomp.runtime import Runtime
from hetcomp.synthetic_routing import synthetic_routing

# Of a model that is to route like the trace by itself so many of the choices must be the trace's.
LEAST_ALIKE = 0.9
_CHECKED_TOKENS = 256


@dataclass(frozen=True)
class ReplayedRouting:
    """``ids``: the token to give at each position; ``note``: whose routing it is, and how much of it is kept."""

    ids: tuple[int, ...]
    note: str


def routing_of(spec: str, plan: Plan) -> RoutingTrace:
    """A trace from the file ``spec``, or a synthetic one of the plan's shape (``zipf:1.1,markov:0.9``).

    Raises HetcompError if it is of another shape, cannot be read, or is not understood.
    """
    layers = moe_layers(plan)
    shapes = {(layer.attrs.experts, layer.attrs.top_k) for layer in layers}
    if len(shapes) != 1:
        kinds = "MoE layers of different shapes" if shapes else "no MoE layers"
        raise HetcompError(f"{plan.model.name} has {kinds}: there is no routing to replay.")
    experts, top_k = next(iter(shapes))
    if not Path(spec).is_file() and ":" in spec:
        return synthetic_routing(spec, len(layers), experts, top_k)
    trace = RoutingTrace.read(Path(spec))
    if (trace.layers, trace.n_experts, trace.top_k) != (len(layers), experts, top_k):
        raise HetcompError(
            f"Routing trace {spec} is of another shape: it has {trace.layers} MoE layers of {trace.n_experts} experts "
            f"with top-{trace.top_k}, {plan.model.name} has {len(layers)} of {experts} with top-{top_k}; a synthetic "
            "one (zipf:1.1,markov:0.9) is of any."
        )
    return trace


@contextmanager
def replayed_routing(exe: Executable, trace: RoutingTrace) -> Iterator[ReplayedRouting]:
    """Within, tokens are routed as ``trace`` says: the one at position p as its token p modulo N.

    Where the CPU computes all routers, the runtime gives the trace's experts and weights to the experts. The routers of
    a GPU cannot be told: such a model must follow the trace by itself when it is given token p modulo N at position p,
    as those of benchmarks/random_artifact.py --routing do. Raises HetcompError if it does not.
    """
    count = min(trace.tokens, exe.plan.model.vocab)
    ids = tuple(position % count for position in range(exe.runtime.info.context))
    told = all(memory_of(layer.placement.device) == CPU for layer in moe_layers(exe.plan))
    if told:
        _tell(exe.runtime, trace, count)
    try:
        alike = _alike(exe, trace, ids)
        if alike < LEAST_ALIKE:
            raise HetcompError(
                f"{exe.path} cannot replay the routing of {trace.source}: its routers run on a GPU, where they are not "
                f"told what to choose, and {alike:.0%} of their choices are the trace's. Make a model that follows it "
                "(python -m benchmarks.random_artifact NAME OUT.hetc --routing ..), or compile with --vram 0."
            )
        yield ReplayedRouting(ids, f"routing of {trace.source}: {alike:.1%} of the choices are the trace's")
    finally:
        if told:
            exe.runtime.replay_routing(None, None)


def _tell(runtime: Runtime, trace: RoutingTrace, count: int) -> None:
    experts, weights = (np.moveaxis(array[:count], 1, 0) for array in (trace.experts, trace.weights))
    runtime.replay_routing(experts.astype(np.int32), weights.astype(np.float32))


def _alike(exe: Executable, trace: RoutingTrace, ids: tuple[int, ...]) -> float:
    """Part of the choices of the first tokens that are the trace's."""
    length = min(_CHECKED_TOKENS, exe.runtime.info.kv_tokens, len(ids))
    made = record_text(exe, ids[:length], "a check").experts
    wanted = trace.experts[np.array(ids[:length])]
    same = (made[..., :, None] == wanted[..., None, :]).any(axis=3)
    return float(same.mean())
