"""What each NUMA node, and a GPU, computes of an op whose weights are cut over several."""

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
    that another node adds). ``experts``: where the weight has an axis 0 of experts and only some are wanted, these."""

    axis: int
    runs: Runs
    zero: bool = False
    experts: Runs = ()

    @property
    def extent(self) -> int:
        """Length of the part along the axis."""
        return _length(self.runs)


@dataclass(frozen=True, slots=True)
class NodePart:
    """The part of node ``node`` (or GPU, ``gpu0``): an op of the same kind with ``attrs``; ``cuts`` are (operand, cut).

    A linear's part writes the columns from ``first_column`` on of the op's output. The parts of experts each give a sum
    over all columns, to be added; ``experts`` are those that the node has, where it has some of them whole.
    """

    node: int | str
    attrs: Attrs
    cuts: tuple[tuple[int, Cut], ...]
    first_column: int = 0
    experts: Runs = ()

    def places(self, experts: int) -> tuple[int, ...]:
        """Where each of the whole op's ``experts`` lies among the part's; -1: elsewhere."""
        here = {e: i for i, e in enumerate(e for start, stop in self.experts for e in range(start, stop))}
        return tuple(here.get(e, -1) for e in range(experts))

    def of(self, op: Op, template: Template) -> tuple[Op, Template]:
        """The part as an op of its own, and the template with the part's weights in place of the whole ones."""
        values = template.value_map()
        for operand, cut in self.cuts:
            whole = values[op.inputs[operand]]
            values[whole.id] = replace(cut_value(whole, cut, self.node), id=whole.id)
        return replace(op, attrs=self.attrs), replace(template, values=tuple(values.values()))


def node_parts(op: Op, placement: Placement) -> tuple[NodePart, ...]:
    """One part a CPU node, in order of the cut; empty where the op runs in one piece or not on the CPU.

    Experts of an op whose input is on a GPU are such parts even where one node has all of them."""
    if placement.streamed:
        return ()
    if isinstance(op.attrs, ops.MoeExperts):
        return _expert_parts(op.attrs, placement)
    if isinstance(op.attrs, ops.Linear) and placement.device.startswith("cpu:") and len(placement.slices) > 1:
        return tuple(_linear_rows(op.attrs, s.node, s.start, s.stop) for s in placement.slices)
    return ()


def _expert_parts(a: ops.MoeExperts, placement: Placement) -> tuple[NodePart, ...]:
    by_node: dict[int, list[tuple[int, int]]] = {}
    for run in placement.experts:
        if run.device.startswith("cpu:"):
            by_node.setdefault(int(run.device[4:]), []).append((run.first, run.last + 1))
    everything = all(run.device.startswith("cpu:") for run in placement.experts)
    here: Runs = () if everything else tuple(run for runs in by_node.values() for run in runs)
    if len(placement.slices) > 1 and (everything or here):
        slices = enumerate(placement.slices)
        return tuple(_expert_slice(a, s.node, (s.start, s.stop), here, i == 0) for i, s in slices)
    main = placement.device[4:] if placement.device.startswith("cpu:") else ""
    if not by_node or (everything and main and set(by_node) == {int(main)}):
        return ()
    return tuple(_whole_experts(a, node, tuple(runs)) for node, runs in sorted(by_node.items()))


def gpu_part(op: Op, placement: Placement) -> NodePart | None:
    """What the op's GPU computes of experts that partly live elsewhere: an op of fewer experts, whose ``experts`` say
    which; None where it has all of them or none."""
    runs = tuple((run.first, run.last + 1) for run in placement.experts if run.device == placement.device)
    assert isinstance(op.attrs, ops.MoeExperts)
    if not placement.device.startswith("gpu:") or not runs or _length(runs) == op.attrs.experts:
        return None
    return _whole_experts(op.attrs, placement.device.replace(":", ""), runs)


def _linear_rows(a: ops.Linear, node: int, start: int, stop: int) -> NodePart:
    rows = ((start, stop),)
    cuts = ((1, Cut(-2, rows)), *(((2, Cut(-1, rows)),) if a.bias else ()))
    return NodePart(node, replace(a, out_features=stop - start), cuts, first_column=start)


def _expert_slice(a: ops.MoeExperts, node: int, columns: tuple[int, int], experts: Runs, first: bool) -> NodePart:
    start, stop = columns
    both = (columns, (a.intermediate + start, a.intermediate + stop))
    cuts: tuple[tuple[int, Cut], ...] = ((3, Cut(-2, both, False, experts)), (4, Cut(-1, (columns,), False, experts)))
    if a.bias:
        biases = experts or ((0, a.experts),)
        cuts = (*cuts, (5, Cut(-1, both, False, experts)), (6, Cut(0, biases, zero=not first)))
    count = _length(experts) if experts else a.experts
    return NodePart(node, replace(a, intermediate=stop - start, experts=count), cuts, experts=experts)


def _length(runs: Runs) -> int:
    return sum(stop - start for start, stop in runs)


def _whole_experts(a: ops.MoeExperts, node: int | str, runs: Runs) -> NodePart:
    cut = Cut(0, runs)
    operands = (3, 4, 5, 6) if a.bias else (3, 4)
    return NodePart(node, replace(a, experts=cut.extent), tuple((o, cut) for o in operands), experts=runs)


def cut_value(value: Value, cut: Cut, node: int | str) -> Value:
    """The weight that holds the part of ``value`` on ``node``; its ids end in ``@node``."""
    shape: list[int | str] = list(value.type.shape)
    shape[cut.axis] = cut.extent
    if cut.experts:
        shape[0] = _length(cut.experts)
    return replace(
        value,
        id=part_id(value.id, node),
        fqn=None if value.fqn is None else part_id(value.fqn, node),
        type=replace(value.type, shape=tuple(shape)),
    )


def part_id(id: str, node: int | str) -> str:
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
    of_parts = [int(part.node) for parts in plan_parts(plan).values() for part in parts]
    main = next((int(device[4:]) for device in devices if device.startswith("cpu:")), min(of_parts, default=0))
    nodes = {main, *of_parts}
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
                    by_operand.setdefault(operand, []).append((cut, int(part.node)))
            for operand, cuts in by_operand.items():
                whole = values[actual[op.inputs[operand]]]
                found[whole.id] = tuple((cut_value(whole, cut, node), cut, node) for cut, node in cuts)
    return found


def gpu_cut_weights(plan: Plan, gpu: str | None = None) -> dict[str, tuple[Value, Cut]]:
    """By id of the plan's whole weight, of which ``gpu`` (None: any) has some experts: the weight that holds them, and
    its cut."""
    values = plan.value_map()
    found: dict[str, tuple[Value, Cut]] = {}
    for call in plan.calls:
        template = plan.template(call.template)
        actual = dict(zip(template.params, call.args, strict=True))
        placements = dict(call.placements)
        for op in template.ops:
            placement = placements[op.id]
            part = gpu_part(op, placement) if isinstance(op.attrs, ops.MoeExperts) else None
            if gpu not in (None, placement.device):
                continue
            for operand, cut in part.cuts if part else ():
                whole = values[actual[op.inputs[operand]]]
                found[whole.id] = cut_value(whole, cut, part.node if part else ""), cut
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
