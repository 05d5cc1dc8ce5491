"""The user's wish that weights stay in the files of the checkpoint (``--weights external``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hetcomp.artifact.external_weights import ExternalWeights, RowReader
from hetcomp.artifact.inspection import in_words
from hetcomp.errors import HetcompError
from hetcomp.ir.node_parts import Cut
from hetcomp.ir.plan import Value, ValueKind
from hetcomp.plan_wishes import PlanWishes
from hetcomp.planned import Planned

PACKED, EXTERNAL = "packed", "external"


def check_wish(weights: str, wishes: PlanWishes) -> None:
    """Raises HetcompError for a word that is none of both, and for what needs packed weights on the disk."""
    if weights not in (PACKED, EXTERNAL):
        raise HetcompError(f"Unknown place of weights '{weights}'; choose {PACKED} or {EXTERNAL}.")
    if weights == EXTERNAL and wishes.from_disk:
        raise HetcompError(
            "Experts are read from the disk as the kernels have them, so --from-disk needs --weights packed; leave one "
            "of both out."
        )


def external_weights(
    planned: Planned, reader: RowReader, cuts: Mapping[str, tuple[Value, Cut]]
) -> tuple[Planned, ExternalWeights]:
    """Which weights of the plan stay where they are, and the plan with a note of them. Raises HetcompError if none
    does."""
    merged = frozenset(planned.adapter.weights) if planned.adapter is not None else frozenset()
    external = ExternalWeights(reader, cuts, merged)
    weights = [value for value in planned.plan.values if value.kind is ValueKind.WEIGHT]
    if not any([external.stored(value) for value in weights if value.format is not None]):
        reasons = "; ".join(external.packed)
        raise HetcompError(
            f"No matrix of {planned.plan.model.name} can stay where it is ({reasons}), so --weights external would "
            "save nothing; leave it out, or give other --formats."
        )
    bytes_of = {value.id: planned.target.packed_bytes(value) for value in weights}
    outside = sum(bytes_of[value.id] for value in weights if external.stored(value) is not None)
    files = ", ".join(Path(source["path"]).name for source in external.sources())
    note = f"{in_words(outside)} of weights stay in {files} and are repacked when the artifact is loaded"
    if external.packed:
        note += "; packed into it: " + ", ".join(f"{in_words(n)} {why}" for why, n in external.packed.items())
    noted = replace(planned, plan=replace(planned.plan, notes=(*planned.plan.notes, note)))
    return noted, ExternalWeights(reader, cuts, merged)
