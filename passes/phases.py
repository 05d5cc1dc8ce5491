"""The steps that a plan is costed, placed and simulated for, from the mix of prompts and answers it is made for."""

from __future__ import annotations

from dataclasses import dataclass

from hetcomp.ir.annotations import Mix
from hetcomp.ir.plan import Plan

# Without a wish: the prompt and answer that llama-bench and most published figures use (pp512, tg128 .. 256).
DEFAULT_PROMPT, DEFAULT_ANSWER = 512, 256


@dataclass(frozen=True)
class Phase:
    """A step to be costed: ``tokens`` tokens of ``sequences`` sequences whose last position is ``position``.
    ``steps``: how many such steps the mix takes (0: reported only)."""

    name: str
    tokens: int
    sequences: int
    position: int
    steps: float = 1.0


def default_mix(context: int) -> Mix:
    """A chat turn that fits into ``context`` positions."""
    answer = max(1, min(DEFAULT_ANSWER, context // 3))
    return Mix(max(1, min(DEFAULT_PROMPT, context - answer)), answer)


def mix_of(plan: Plan) -> Mix:
    """The plan's mix, or the default one for its context."""
    return plan.mix or default_mix(plan.dim("context").max)


def phases(plan: Plan) -> tuple[Phase, ...]:
    """Decode at the mean position of the answer: of one sequence and, where the plan keeps several, of all; prefill
    of one full step, in the middle of the prompt."""
    mix, slots, step = mix_of(plan), plan.dim("slots").max, plan.dim("T").max
    position = min(plan.dim("context").max, mix.prompt + mix.answer // 2)
    one = mix.batch == 1
    found = [Phase("decode", 1, 1, position, mix.answer if one else 0.0)]
    for batch in sorted({slots, mix.batch} - {1}):
        steps = float(mix.answer) if batch == mix.batch else 0.0
        found.append(Phase(f"decode batch {batch}", batch, batch, position, steps))
    tokens = min(mix.prompt, step)
    chunks = mix.batch * mix.prompt / tokens
    return (*found, Phase("prefill", tokens, 1, max(tokens, (mix.prompt + tokens) // 2), chunks))
