"""Rotary embedding that is spelled out: what lies before queries and keys of an attention, tried on random numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from hetcomp.errors import HetcompError
from hetcomp.frontend.onnx.evaluate import Run
from hetcomp.frontend.onnx.graph import Graph, Node
from hetcomp.frontend.onnx.not_computable import NotComputable
from hetcomp.frontend.onnx.regions import Region, Regions
from hetcomp.frontend.onnx.rope_frequencies import fit
from hetcomp.frontend.recognise import RopeStyle, rope_reference

_TOLERANCE = 1e-5
_VIEWS = frozenset({"Transpose", "Reshape", "Cast", "Identity"})


@dataclass(frozen=True)
class Rotation:
    """How heads of [.., T, D] are rotated; cos and sin [T, rotary_dim / 2] at the positions of the trial."""

    style: RopeStyle
    rotary_dim: int
    cos: Tensor
    sin: Tensor


def replace_ropes(graph: Graph, run: Run, far: Run, origin: str) -> Graph:
    """The graph with hetcomp.RopeTable and hetcomp.Rope in front of each attention's queries and keys. Raises
    HetcompError naming what depends on positions in another way."""
    regions = Regions(graph, run)
    new: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for value, head_dim in _heads_of(run, node):
            region = _rotated(regions, value)
            if region is None or region.result in new:
                continue
            try:
                new[region.result] = _rope(run, far, region, head_dim, node)
            except NotComputable as error:
                raise HetcompError(f"{origin}: the rotary embedding before {node} {error}") from error
    return graph.replaced(new, graph.outputs[:1])


def _heads_of(run: Run, node: Node) -> list[tuple[str, int]]:
    """Queries or keys that an attention takes, with the size of their heads."""
    if node.op in ("hetcomp.KvAppend", "hetcomp.Attention"):
        return [(node.inputs[0], run.shape(node.inputs[0])[-1])]
    if node.op != "com.microsoft.GroupQueryAttention" or not node.input(1):
        return []
    heads = node.attributes["num_heads"], node.attributes["kv_num_heads"]
    return [(v, run.shape(v)[-1] // int(n)) for v, n in zip(node.inputs[:2], heads, strict=True)]


def _rotated(regions: Regions, value: str) -> Region | None:
    """The region behind ``value`` that a single activation goes into and something that depends on positions; None if
    there is none, or only another op that hetcomp knows."""
    while (node := regions.producers.get(value)) is not None and not node.op.startswith("hetcomp."):
        region = regions.to_single_source(value)
        if region is None:
            return None
        if any(n.op.startswith("hetcomp.") or n.op == "MatMul" for n in region.nodes):
            return None
        if _positions(regions.run, region):
            return region
        if len(region.nodes) > 1 or node.op not in _VIEWS:
            return None
        value = region.sources[0]
    return None


def _positions(run: Run, region: Region) -> list[str]:
    """The numbers among a region's operands that are more than one for each of the step's tokens."""
    operands = dict.fromkeys(v for node in region.nodes for v in node.inputs if v)
    known = [v for v in operands if not run.values[v].is_meta and v not in run.weights]
    return [v for v in known if run.tokens in run.shape(v)]


def _rope(run: Run, far: Run, region: Region, head_dim: int, node: Node) -> list[Node]:
    rotation = rotation_of(run, region, head_dim)
    constants = [t for v, t in run.values.items() if not t.is_meta and t.numel() == rotation.rotary_dim // 2]
    table = fit(rotation.cos, rotation.sin, run.past, constants)
    distant = rotation_of(far, region, head_dim)
    table.check(distant.cos, distant.sin, far.past)
    result = region.result
    tables = (f"{result}:cos", f"{result}:sin")
    frequencies = {"inv_freq": table.inv_freq, "scaling": table.scaling}
    attributes = {"rotary_dim": rotation.rotary_dim, "style": rotation.style, "head_dim": head_dim}
    return [
        Node(node.name, "hetcomp.RopeTable", (), tables, frequencies),
        Node(node.name, "hetcomp.Rope", (region.sources[0], *tables), (result,), attributes, node.scope),
    ]


def rotation_of(run: Run, region: Region, head_dim: int) -> Rotation:
    """What the region does to heads at the run's positions. Raises NotComputable if it is no rotation of ours."""
    (x,) = region.sources
    shape = run.shape(x)
    if shape[0] != 1 or shape[-1] % head_dim or run.tokens not in shape[1:3]:
        raise NotComputable(f"rotates a tensor of shape {list(shape)}, which hetcomp does not know")

    def rotated(heads: Tensor) -> Tensor:
        """[H, T, D] -> the same."""
        given = heads.transpose(0, 1).reshape(shape) if shape[1] == run.tokens else heads.reshape(shape)
        made = run.trial(region.nodes, {x: given})[region.result]
        if made.shape == (1, run.tokens, *heads.shape[::2]):
            return made[0].transpose(0, 1)
        if made.shape[1] == run.tokens and shape[1] == run.tokens:
            return made.reshape(run.tokens, -1, head_dim).transpose(0, 1)
        return made.reshape(-1, run.tokens, head_dim)

    count = Tensor(list(shape)).prod().int().item() // (run.tokens * head_dim)
    numbers = torch.randn(int(count), run.tokens, head_dim, generator=torch.Generator().manual_seed(5))
    want = rotated(numbers)
    turned = (want != numbers).flatten(0, 1).any(0).nonzero()
    rotary_dim = int(turned.max()) + 1 if len(turned) else 0
    for style in get_args(RopeStyle):
        for width in dict.fromkeys((rotary_dim, head_dim)):
            if width < 2 or width % 2:
                continue
            probe = torch.zeros(int(count), run.tokens, head_dim)
            first = slice(0, width // 2) if style == "half" else slice(0, width, 2)
            probe[..., first] = 1.0
            seen = rotated(probe)[0]
            if style == "interleaved":
                cos, sin = seen[:, 0:width:2], seen[:, 1:width:2]
            else:
                cos, sin = seen[:, : width // 2], seen[:, width // 2 : width]
            got = rope_reference(numbers, cos, sin, width, style)
            if torch.allclose(got, want, rtol=_TOLERANCE, atol=_TOLERANCE):
                return Rotation(style, width, cos, sin)
    raise NotComputable("rotates in a way that hetcomp does not know")
