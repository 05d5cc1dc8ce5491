"""How many tokens a plan's largest step has, where the user has no wish: so many that a request which fills its
context takes least.

A long step shares what is streamed to GPUs and saves launches, but its activations take memory of the GPU that experts,
and slots for those on their way, then lack: prompts gain, answers may lose. Each length is placed by rule (greedily,
without the solver) and simulated as the plan will be.
"""

from __future__ import annotations

from dataclasses import replace

from hetcomp.errors import HetcompError
from hetcomp.ir.annotations import Mix
from hetcomp.ir.kv_pool import KvPool
from hetcomp.ir.plan import Plan
from hetcomp.passes.annotate_cost import cost_plan
from hetcomp.passes.cache_experts import cache_experts
from hetcomp.passes.context import Context
from hetcomp.passes.mix_time import ready_to_simulate
from hetcomp.passes.phases import Phase, default_mix
from hetcomp.passes.place import placed_as
from hetcomp.passes.placement_assignment import fits
from hetcomp.passes.placement_candidates import by_rule
from hetcomp.passes.placement_problem import placement_problem
from hetcomp.passes.simulate import timeline
from hetcomp.passes.slice_numa import slice_numa
from hetcomp.passes.stream_experts import stream_experts
from hetcomp.passes.stream_weights import stream_weights

STEP_TOKENS = (512, 1024, 2048, 4096, 8192)
# Within half a percent are equal, as formats are (passes/format_search.py); the shorter one wins then.
_TIE = 1.005


def step_tokens(plan: Plan, context: Context) -> int:
    """The best of STEP_TOKENS, up to the first that takes the whole prompt at once and to the bound of the plan's T;
    the shortest where none fits. ``plan``: with formats, and with costs of any steps."""
    prompt, answer = _request(plan)
    most = plan.dim("T").max
    useful = [n for n in STEP_TOKENS if n // 2 < prompt and n <= most] or [min(most, STEP_TOKENS[0])]
    if len(useful) == 1:
        return useful[0]
    times = {n: us for n in useful if (us := request_us(plan, context, n, prompt, answer)) is not None}
    least = min(times.values(), default=0.0)
    return next((n for n, us in times.items() if us <= least * _TIE), useful[0])


def request_us(plan: Plan, context: Context, tokens: int, prompt: int, answer: int) -> float | None:
    """Simulated microseconds of a prompt in steps of ``tokens``, and of its answer; None where the plan does not fit
    with such steps."""
    dims = tuple(replace(d, max=tokens) if d.name == "T" else d for d in plan.dims)
    steps = _steps(prompt, answer, tokens)
    costed = cost_plan(replace(plan, dims=dims, mix=Mix(prompt, answer)), tuple(steps), context)
    problem = placement_problem(costed, context)
    assignment = next((a for a in by_rule(problem) if fits(problem, a)), None)
    if assignment is None:
        return None
    try:
        sliced = slice_numa(placed_as(costed, context, problem, assignment), context)
        streamed = stream_experts(stream_weights(sliced, context), context)
        ready = ready_to_simulate(cache_experts(streamed, context), context)
    except HetcompError:  # no room for an expert cache
        return None
    return sum(n * timeline(ready, i, step, context).total_us for i, (step, n) in enumerate(steps.items()))


def _request(plan: Plan) -> tuple[int, int]:
    """Prompt and answer of a request that fills the context."""
    longest = KvPool.of(plan.max_dims()).longest
    answer = default_mix(longest).answer
    return max(1, longest - answer), answer


def _steps(prompt: int, answer: int, tokens: int) -> dict[Phase, int]:
    """Steps of a request by how often they are taken: full ones at their mean position, the prompt's rest, decode."""
    full, rest = divmod(prompt, tokens)
    steps = {Phase("decode", 1, 1, prompt + answer // 2): answer}
    if full:
        steps[Phase("prefill", tokens, 1, tokens * (full + 1) // 2)] = full
    if rest:
        steps[Phase("prefill", rest, 1, prompt)] = 1
    return steps
