"""How often each expert is chosen: from a statistics file, or uniformly."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass

from hetcomp.errors import HetcompError
from hetcomp.ir import ops
from hetcomp.ir.plan import Plan

UNIFORM = "uniform"


@dataclass(frozen=True)
class ExpertStatistics:
    """``shares[layer][expert]``: part of the layer's assignments (token x top-k) that go to the expert, MoE layers in
    order, each summing to 1. ``name`` says where they come from."""

    name: str
    top_k: int
    shares: tuple[tuple[float, ...], ...]


def parse_statistics(text: str, origin: str, domain: str | None = None) -> ExpertStatistics:
    """Reads a statistics file: JSON with ``top_k``, ``experts``, ``layers``, ``frequency`` ([layer][expert], or by
    domain) and, for several domains, ``tokens_per_domain`` as their weights.

    domain: one of the file's domains (None: all, weighted by tokens). Raises HetcompError naming the place.
    """
    try:
        document = json.loads(text)
    except ValueError as error:
        raise HetcompError(f"Expert statistics {origin} are not valid JSON: {error}.") from None
    if not isinstance(document, dict) or "frequency" not in document or not isinstance(document.get("top_k"), int):
        raise HetcompError(
            f"{origin} is no file of expert statistics: expected a JSON object with top_k and frequency "
            "([layer][expert], or one such table a domain)."
        )
    frequency = document["frequency"]
    tables: list[tuple[float, object]] = [(1.0, frequency)]
    if isinstance(frequency, dict):
        if domain is not None and domain not in frequency:
            raise HetcompError(f"{origin} has no domain '{domain}'; it has {', '.join(frequency)}.")
        weights = document.get("tokens_per_domain") or {}
        chosen = [domain] if domain is not None else list(frequency)
        tables = [(float(weights.get(name, 1.0)), frequency[name]) for name in chosen]
    elif domain is not None:
        raise HetcompError(f"{origin} has no domains; leave out '{domain}'.")
    shares = _mean([(weight, _table(table, origin)) for weight, table in tables], origin)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return ExpertStatistics(f"{origin}{'#' + domain if domain else ''} ({digest})", document["top_k"], shares)


def check_statistics(statistics: ExpertStatistics, plan: Plan) -> None:
    """Raises HetcompError if the statistics are not of this model: other layers, experts or top-k."""
    layers = moe_layers(plan)
    want = [(a.experts, a.top_k) for a in layers]
    got = [(len(row), statistics.top_k) for row in statistics.shares]
    if want != got:
        raise HetcompError(
            f"Expert statistics {statistics.name} are of another model: they have {_spell(got)}, "
            f"{plan.model.name} has {_spell(want)}."
        )


def moe_layers(plan: Plan) -> list[ops.MoeExperts]:
    """The MoE ops of all calls in order."""
    found = []
    for call in plan.calls:
        found += [op.attrs for op in plan.template(call.template).ops if isinstance(op.attrs, ops.MoeExperts)]
    return found


def inclusion(share: float, top_k: int) -> float:
    """Probability that a token chooses an expert with that share of the assignments."""
    return min(1.0, share * top_k)


def _spell(layers: list[tuple[int, int]]) -> str:
    if not layers:
        return "no MoE layers"
    kinds = ", ".join(f"{e} experts with top-{k}" for e, k in sorted(set(layers)))
    return f"{len(layers)} MoE layers of {kinds}"


def _table(table: object, origin: str) -> list[list[float]]:
    if not isinstance(table, list) or not all(isinstance(row, list) and row for row in table):
        raise HetcompError(f"{origin}: frequency must be a table [layer][expert] of numbers.")
    for layer, row in enumerate(table):
        for expert, share in enumerate(row):
            if not isinstance(share, (int, float)) or not math.isfinite(share) or share < 0:
                raise HetcompError(f"{origin}: frequency of layer {layer}, expert {expert} is {share}; expected >= 0.")
        if sum(row) <= 0:
            raise HetcompError(f"{origin}: no expert of layer {layer} was ever chosen.")
    return [[float(x) for x in row] for row in table]


def _mean(tables: list[tuple[float, list[list[float]]]], origin: str) -> tuple[tuple[float, ...], ...]:
    first = tables[0][1]
    for _, table in tables:
        if [len(row) for row in table] != [len(row) for row in first]:
            raise HetcompError(f"{origin}: the tables of the domains differ in shape.")
    rows = []
    for layer in range(len(first)):
        sums = [sum(w * t[layer][e] for w, t in tables) for e in range(len(first[layer]))]
        rows.append(tuple(x / sum(sums) for x in sums))
    return tuple(rows)
