"""Records how a loaded artifact routes tokens, while it runs as it always does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from hetcomp.errors import HetcompError
from hetcomp.executable import Executable
from hetcomp.ir.deferral import moe_layers
from hetcomp.ir.homes import CPU, memory_of
from hetcomp.ir.plan import Plan
from hetcomp.routing_trace import RoutedStep, RoutingTrace
from hetcomp.runtime import Runtime
from hetcomp.runtime_abi import RoutingCallback
from hetcomp.step_callbacks import collected


@contextmanager
def recorded_steps(runtime: Runtime) -> Iterator[list[RoutedStep]]:
    """Within, every step of ``runtime`` is added to the list, from whichever thread it is run."""
    with collected(runtime.set_routing_callback, RoutingCallback, _step) as steps:
        yield steps


def record_text(exe: Executable, ids: Sequence[int], source: str, generate: int = 0) -> RoutingTrace:
    """The routing of ``ids`` as prompts, in as many sequences as the context asks for, and of ``generate`` tokens that
    are then generated greedily behind the last of them. source: what the trace says of its origin.

    Raises HetcompError as :func:`run_text` does, for a model without MoE layers, or one with layers whose routing stays
    on a GPU.
    """
    experts, layers = recordable(exe.plan)
    with recorded_steps(exe.runtime) as steps:
        run_text(exe, ids, generate)
    trace = RoutingTrace.of_steps(exe.plan.model.name, source, experts, steps)
    if trace.layers != layers:
        raise HetcompError(
            f"{exe.path} told the routing of {trace.layers} MoE layers, its plan has {layers}; compile the model again."
        )
    return trace


def run_text(exe: Executable, ids: Sequence[int], generate: int = 0) -> None:
    """Runs ``ids`` as prompts, in as many sequences as the context asks for, and generates ``generate`` tokens behind
    the last of them. Raises HetcompError for no ids, or an answer that leaves no room for a prompt."""
    if not ids:
        raise HetcompError("There are no tokens to run; give a longer text.")
    longest = min(exe.runtime.info.context, exe.runtime.info.kv_tokens) - generate
    if longest < 1:
        raise HetcompError(
            f"{generate} tokens to generate do not fit behind a prompt into the context of {exe.plan.model.name}, "
            f"{longest + generate} positions; give fewer."
        )
    parts = [ids[start : start + longest] for start in range(0, len(ids), longest)]
    for part in parts if not generate else parts[:-1]:
        with exe.runtime.session() as session:
            session.prefill(part)
    if generate:
        for _ in exe.runtime.generate(parts[-1], max_new_tokens=generate, ignore_eos=True):
            pass


def recordable(plan: Plan) -> tuple[int, int]:
    """Experts of a layer, and MoE layers, of a model whose routing the CPU sees. Raises HetcompError for others."""
    layers, name = moe_layers(plan), plan.model.name
    if not layers:
        raise HetcompError(f"{name} has no MoE layers, so that there is no routing to record.")
    away = [n for n, layer in enumerate(layers) if not (layer.hands_over or memory_of(layer.placement.device) == CPU)]
    if away:
        raise HetcompError(
            f"The routing of {len(away)} of the {len(layers)} MoE layers of {name} stays on the GPU, where all of "
            "their experts are: record it with an artifact that is compiled with --vram 0."
        )
    sizes = {layer.attrs.experts for layer in layers}
    if len(sizes) > 1:
        raise HetcompError(f"The MoE layers of {name} have different numbers of experts; a trace is of equal ones.")
    return sizes.pop(), len(layers)


def _step(told: Any) -> RoutedStep:  # noqa: ANN401 - a structure of ctypes
    """A copy of what the runtime told."""
    n, layers, top_k = told.n_tokens, told.n_layers, told.top_k
    shape = (layers, n, top_k)
    return RoutedStep(
        bool(told.decode),
        np.ctypeslib.as_array(told.positions, (n,)).copy(),
        np.ctypeslib.as_array(told.slots, (n,)).copy(),
        np.ctypeslib.as_array(told.experts, shape).copy() if layers else np.zeros(shape, np.int32),
        np.ctypeslib.as_array(told.weights, shape).copy() if layers else np.zeros(shape, np.float32),
    )
