"""What each NUMA node computes of an op whose weights are cut over several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hetcomp.ir import ops
from hetcomp.ir.annotations import Placement
from hetcomp.ir.ops import Attrs
from hetcomp.ir.plan import Op, Plan, Template, Value, ValueKind

ALIGNMENT = 64  # of everything in a workspace: a cache line, and the widest vector

Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """A part of a weight: ``runs`` (start, stop) of ``axis``, one after the other. The axis is 0 (experts) or counted
    from the end, so that it is the same in one matrix as in a stack. ``zero``: numbers of value 0 in that shape (a bias
    that another node adds)."""

    axis: int
    runs: Runs
    zero: bool = False

    @property
    def extent(self) -> int:
        """Length of the part along the axis."""
        return sum(stop - start for start, stop in self.runs)


@dataclass(frozen=True, slots=True)
class NodePart:
    """The part of node ``node``: an op of the same kind with ``attrs``; ``cuts`` are (operand, cut).

    A linear's part writes the columns from ``first_column`` on of the op's output. The parts of experts each give a sum
    over all columns, to be added; ``experts`` are those that the node has, where it has some of them whole.
    """

    node: int
    attrs: Attrs
    cuts: tuple[tuple[int, Cut], ...]
    first_column: int = 0
    experts: Runs = ()

    def of(self, op: Op, template: Template) -> tuple[Op, Template]:
        """The part as an op of its own, and the template with the part's weights in place of the whole ones."""
        values = template.value_map()
        for operand, cut in self.cuts:
            whole = values[op.inputs[operand]]
            values[whole.id] = replace(cut_value(whole, cut, self.node), id=whole.id)
        return replace(op, attrs=self.attrs), replace(template, values=tuple(values.values()))


def node_parts(op: Op, placement: Placement) -> tuple[NodePart, ...]:
    """One part a node, in order of the cut; empty where the op runs in one piece (or not on the CPU alone)."""
    devices = {placement.device, *(run.device for run in placement.experts)}
    if placement.streamed or not all(device.startswith("cpu:") for device in devices):
        return ()
    if isinstance(op.attrs, ops.MoeExperts):
        by_node: dict[int, list[tuple[int, int]]] = {}
        for run in placement.experts:
            by_node.setdefault(int(run.device[4:]), []).append((run.first, run.last + 1))
        if by_node and set(by_node) != {int(placement.device[4:])}:
            return tuple(_whole_experts(op.attrs, node, tuple(runs)) for node, runs in sorted(by_node.items()))
    if len(placement.slices) < 2:
        return ()
    if isinstance(op.attrs, ops.MoeExperts):
        a = op.attrs
        return tuple(_expert_slice(a, s.node, s.start, s.stop, i == 0) for i, s in enumerate(placement.slices))
    if isinstance(op.attrs, ops.Linear):
        return tuple(_linear_rows(op.attrs, s.node, s.start, s.stop) for s in placement.slices)
    return ()


def _linear_rows(a: ops.Linear, node: int, start: int, stop: int) -> NodePart:
    rows = ((start, stop),)
    cuts = ((1, Cut(-2, rows)), *(((2, Cut(-1, rows)),) if a.bias else ()))
    return NodePart(node, replace(a, out_features=stop - start), cuts, first_column=start)


def _expert_slice(a: ops.MoeExperts, node: int, start: int, stop: int, first: bool) -> NodePart:
    both = ((start, stop), (a.intermediate + start, a.intermediate + stop))
    cuts: tuple[tuple[int, Cut], ...] = ((3, Cut(-2, both)), (4, Cut(-1, ((start, stop),))))
    if a.bias:
        cuts = (*cuts, (5, Cut(-1, both)), (6, Cut(0, ((0, a.experts),), zero=not first)))
    return NodePart(node, replace(a, intermediate=stop - start), cuts)


def _whole_experts(a: ops.MoeExperts, node: int, runs: Runs) -> NodePart:
    cut = Cut(0, runs)
    operands = (3, 4, 5, 6) if a.bias else (3, 4)
    return NodePart(node, replace(a, experts=cut.extent), tuple((o, cut) for o in operands), experts=runs)


def cut_value(value: Value, cut: Cut, node: int) -> Value:
    """The weight that holds the part of ``value`` on ``node``; its ids end in ``@node``."""
    shape: list[int | str] = list(value.type.shape)
    shape[cut.axis] = cut.extent
    return replace(
        value,
        id=part_id(value.id, node),
        fqn=None if value.fqn is None else part_id(value.fqn, node),
        type=replace(value.type, shape=tuple(shape)),
    )


def part_id(id: str, node: int) -> str:
    """Name of what belongs to one node's part."""
    return f"{id}@{node}"


def plan_parts(plan: Plan) -> dict[tuple[str, str], tuple[NodePart, ...]]:
    """The parts of every op that has some, by template and op. All calls of a template have the same."""
    found: dict[tuple[str, str], tuple[NodePart, ...]] = {}
    first = {call.template: call for call in reversed(plan.calls)}
    for template in plan.templates:
        placements = dict(first[template.name].placements) if template.name in first else {}
        for op in template.ops:
            if op.id in placements and (parts := node_parts(op, placements[op.id])):
                found[template.name, op.id] = parts
    return found


def plan_nodes(plan: Plan) -> tuple[tuple[int, ...], int]:
    """Ids of the NUMA nodes that the plan uses, ascending, and the index of the one that holds what is not cut."""
    devices = [p.device for call in plan.calls for _, p in call.placements]
    main = next((int(device[4:]) for device in devices if device.startswith("cpu:")), 0)
    nodes = {main, *(part.node for parts in plan_parts(plan).values() for part in parts)}
    return tuple(sorted(nodes)), sorted(nodes).index(main)


def cut_weights(plan: Plan) -> dict[str, tuple[tuple[Value, Cut, int], ...]]:
    """By id of the plan's whole weight: the weights of its parts, their cuts and nodes."""
    parts, values = plan_parts(plan), plan.value_map()
    found: dict[str, tuple[tuple[Value, Cut, int], ...]] = {}
    for call in plan.calls:
        template = plan.template(call.template)
        actual = dict(zip(template.params, call.args, strict=True))
        for op in template.ops:
            by_operand: dict[int, list[tuple[Cut, int]]] = {}
            for part in parts.get((template.name, op.id), ()):
                for operand, cut in part.cuts:
                    by_operand.setdefault(operand, []).append((cut, part.node))
            for operand, cuts in by_operand.items():
                whole = values[actual[op.inputs[operand]]]
                found[whole.id] = tuple((cut_value(whole, cut, node), cut, node) for cut, node in cuts)
    return found


def shared_weights(plan: Plan) -> set[str]:
    """Ids of the plan's weights that several ops read (tied embeddings): cut for one they could not serve the other."""
    seen: set[str] = set()
    shared: set[str] = set()
    for call in plan.calls:
        template = plan.template(call.template)
        values = template.value_map()
        actual = dict(zip(template.params, call.args, strict=True))
        for op in template.ops:
            for name in op.inputs:
                if values[name].kind is ValueKind.WEIGHT and name in actual:
                    (shared if actual[name] in seen else seen).add(actual[name])
    return shared


@dataclass(frozen=True, slots=True)
class PartWorkspace:
    """Byte offsets within the op's workspace: of every part's own scratch memory, of its ids of chosen experts where
    experts are whole, of its partial sum; the first part has none, it writes to the output."""

    scratch: tuple[int, ...]
    ids: tuple[int, ...]
    partials: tuple[int, ...]
    bytes: int


def part_workspace(
    op: Op, template: Template, parts: Sequence[NodePart], sizes: Sequence[int], dims: Mapping[str, int]
) -> PartWorkspace:
    """Lays out the workspace of an op in parts whose kernels need ``sizes`` bytes."""
    end = 0

    def take(size: int) -> int:
        nonlocal end
        start = end
        end += -(-size // ALIGNMENT) * ALIGNMENT
        return start

    values = template.value_map()
    scratch = tuple(take(size) for size in sizes)
    ids: list[int] = []
    partials: list[int] = []
    for i, part in enumerate(parts):
        if part.experts:
            ids.append(take(values[op.inputs[1]].type.bytes(dict(dims))))
        if i > 0 and isinstance(part.attrs, ops.MoeExperts):
            partials.append(take(values[op.outputs[0]].type.bytes(dict(dims))))
    return PartWorkspace(scratch, tuple(ids), tuple(partials), end)
