"""What the checkpoint's weights are stored in and computed in, by class of tensor."""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.table import Table

from hetcomp.backends.packing import ROW_MAJOR, packed_bytes
from hetcomp.ir.native_format import native_format
from hetcomp.ir.plan import Plan, Value, ValueKind
from hetcomp.passes.choose_formats import weight_role


@dataclass
class WeightClass:
    """Weights of one role that are stored alike and computed in one format. ``source``: how the checkpoint stores them,
    with ``source_bits`` of a weight (None: no checkpoint). ``exact``: nothing is lost between the two."""

    role: str
    source: str
    source_bits: float | None
    format: str
    exact: bool
    weights: int = 0
    numbers: int = 0
    bytes: int = 0

    @property
    def bits(self) -> float:
        """Bits that a weight takes in the kernels' format, padding and scales included."""
        return 8 * self.bytes / self.numbers if self.numbers else 0.0


_BITS = {"F64": 64.0, "F32": 32.0, "F16": 16.0, "BF16": 16.0}
# What each format holds of the checkpoint's float types without rounding.
_HOLDS = {"f32": ("F32", "F16", "BF16"), "bf16": ("BF16",)}


def weight_classes(plan: Plan) -> tuple[WeightClass, ...]:
    """The classes of matrices in the order of their first use; each weight is counted once."""
    found: dict[tuple[str, str, str, bool], WeightClass] = {}
    seen: set[str] = set()
    values = plan.value_map()
    for call in plan.calls:
        template = plan.template(call.template)
        actual = dict(zip(template.params, call.args, strict=True))
        for op in template.ops:
            for value in (values[actual[name]] for name in op.inputs if actual.get(name) in values):
                if value.kind is not ValueKind.WEIGHT or value.format is None or value.type.layout == ROW_MAJOR:
                    continue
                if value.id in seen:
                    continue
                seen.add(value.id)
                source, bits, exact = _source(value)
                key = weight_role(op), source, value.format, exact
                one = found.setdefault(key, WeightClass(weight_role(op), source, bits, value.format, exact))
                one.weights += 1
                one.numbers += value.type.numel({})
                one.bytes += packed_bytes(value)
    return tuple(found.values())


def _source(value: Value) -> tuple[str, float | None, bool]:
    """How the checkpoint stores it, in how many bits, and whether the value's format has the same numbers."""
    if value.source is None:
        return "–", None, False
    native = native_format(value, value.type.layout)
    if native is not None:
        exact = value.format == "f32" or (native.format == value.format and not native.inexact)
        return native.label, native.bits, exact
    types = sorted({t.dtype.upper() for t in value.source.tensors})
    return ", ".join(types), _BITS.get(types[0]), set(types) <= set(_HOLDS.get(str(value.format), ()))


def weight_table(plan: Plan) -> Table | None:
    """The classes as a table; None for a plan whose formats are not chosen."""
    classes = weight_classes(plan)
    if not classes:
        return None
    table = Table(title="Matrices", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("role", no_wrap=True)
    table.add_column("in the checkpoint")
    table.add_column("bits", justify="right", no_wrap=True)
    table.add_column("computed in", no_wrap=True)
    table.add_column("bits", justify="right", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    for one in classes:
        stored = f"{one.source_bits:.2f}" if one.source_bits is not None else ""
        form = f"{one.format}{'' if one.exact else ' (rounded)' if one.source_bits is not None else ''}"
        table.add_row(one.role, one.source, stored, form, f"{one.bits:.2f}", f"{one.bytes:,}")
    return table
