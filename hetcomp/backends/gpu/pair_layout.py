"""Memory of a GPU for the pairs of LoRA adapters that come and go at run time.

The buffer of pairs is filled by the runtime, adapter by adapter; a table says where in it the pair of each weight and
slot is (runtime_lib/src/gpu/adapter_memory.h). Graphs that add pairs read the table, so that none is built anew.
"""

from __future__ import annotations

from dataclasses import dataclass

from hetcomp.backends.adapted_ops import AdaptableWeight, gpu_shape_of, pair_bytes
from hetcomp.backends.gpu.low_rank import PairTables
from hetcomp.ir.adaptable import adaptable_weights
from hetcomp.ir.annotations import AdapterRoom
from hetcomp.ir.expert_matrices import expert_matrices
from hetcomp.ir.homes import read_in
from hetcomp.ir.ops import MoeExperts
from hetcomp.ir.plan import Plan, Value

WORDS = 4  # i64, of a pair in the table
_NUMBERS = {4: "fp32", 2: "bf16"}


@dataclass(frozen=True)
class PairLayout:
    """``weights`` in the order of their rows of the table, with what adapters may change of them: of experts all of the
    layer, wherever they are. There may be none, where only another GPU has some."""

    room: AdapterRoom
    weights: tuple[tuple[Value, AdaptableWeight], ...]

    @staticmethod
    def of(plan: Plan, gpu: str) -> PairLayout | None:
        """None where the plan has no room for adapters."""
        room = plan.adapter_room
        if room is None:
            return None
        changed = changed_on(plan, gpu) - (set() if room.experts else expert_matrices(plan))
        return PairLayout(room, tuple((v, gpu_shape_of(v)) for v in plan.values if v.id in changed))

    @property
    def row_bytes(self) -> int:
        """Of the table."""
        return 8 * WORDS * self.room.count

    @property
    def table_bytes(self) -> int:
        """Of the buffer; its last row is of weights that no adapter changes."""
        return (len(self.weights) + 1) * self.row_bytes

    @property
    def pair_bytes(self) -> int:
        """Of the buffer of pairs."""
        return max(64, self.room.count * sum(sum(pair_bytes(shape, self.room.rank)) for _, shape in self.weights))

    def tables(self) -> PairTables:
        """What launches need to know."""
        offsets = {v.id: i * self.row_bytes for i, (v, _) in enumerate(self.weights)}
        numbers = {v.id: _NUMBERS[shape.number_bytes] for v, shape in self.weights}
        return PairTables(offsets, numbers, len(self.weights) * self.row_bytes, self.room.rank, self.room.count)


def changed_on(plan: Plan, gpu: str) -> set[str]:
    """Ids of the plan's weights that adapters may change and that ``gpu`` computes with, all or a part, in some step;
    experts that are streamed to it, which it may leave to the CPU, only where there is room for their pairs."""
    readers, experts = read_in(plan), expert_matrices(plan)
    found = {id for id in adaptable_weights(plan) if gpu in readers[id] and id not in experts}
    room = plan.adapter_room
    streams = plan.expert_cache is not None or (plan.stream is not None and room is not None and room.experts)
    for call in plan.calls:
        template, placements = plan.template(call.template), dict(call.placements)
        actual = dict(zip(template.params, call.args, strict=True))
        for op in template.ops:
            if not isinstance(op.attrs, MoeExperts) or placements[op.id].device != gpu:
                continue
            homes = {run.device for run in placements[op.id].experts} or {gpu}
            if streams or gpu in homes:
                found |= {actual[name] for name in op.inputs[3:5]}
    return found


def streamed_to(plan: Plan, gpu: str) -> set[str]:
    """Ids of the plan's weights that adapters may change and that are copied to ``gpu`` in prompts (experts apart): it
    has no pairs for them, and graphs that add adapters leave them to the CPU."""
    found: set[str] = set()
    for call in plan.calls:
        template, placements = plan.template(call.template), dict(call.placements)
        actual = dict(zip(template.params, call.args, strict=True))
        for op in template.ops:
            if placements[op.id].in_prompts == gpu:
                found |= {actual[name] for name in op.inputs if name in actual}
    return found & set(adaptable_weights(plan))
