"""Multi-head latent attention in decode: what is done between its projections and attention, as two launches.

As transformers spells it, with absorbed projections: queries are cut in a part that is projected to the latents' width
and a part that is rotated, both joined again; the cache's row is the norm of the latent and a rotated key.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING

from hetcomp.backends.gpu.attention import CACHE_TYPES
from hetcomp.backends.gpu.gemv import Matrix, linear_gemv, pairs_of_gemv
from hetcomp.backends.gpu.kernels import ONE, ROWS, GpuCode, GridAxis, Operand, launch
from hetcomp.backends.gpu.tiles import power_of_two
from hetcomp.ir.ops import Attention, Concat, HeadLinear, KvAppend, RmsNorm, Rope, Slice
from hetcomp.ir.types import DType

if TYPE_CHECKING:
    from hetcomp.backends.gpu.low_rank import Pairs
    from hetcomp.backends.gpu.patterns import Run


@dataclass(frozen=True)
class LatentOps:
    """Numbers of the ops in front of one attention on latents."""

    append: int
    q_concat: int
    absorb: int
    q_rope: int
    q_slice: int
    q_part: int
    kv_concat: int
    norm: int
    k_rope: int
    kv_slice: int
    kv_part: int

    def members(self) -> list[int]:
        """All of them, in order."""
        return sorted(astuple(self))


# Which op writes an operand of one found before, for it alone: name, reader's name, operand, kind.
_WRITERS = (
    ("absorb", "q_concat", 0, "head_linear"),
    ("q_rope", "q_concat", 1, "rope"),
    ("q_slice", "absorb", 0, "slice"),
    ("q_part", "q_rope", 0, "slice"),
    ("kv_concat", "append", 0, "concat"),
    ("norm", "kv_concat", 0, "rms_norm"),
    ("k_rope", "kv_concat", 1, "rope"),
    ("kv_slice", "norm", 0, "slice"),
    ("kv_part", "k_rope", 0, "slice"),
)


def find_latent_ops(run: Run, attention: int) -> LatentOps | None:
    """The ops in front of an attention with ``shared_kv``, if they are those of MLA."""
    op = run.ops[attention]
    append = run.append_to(op.inputs[1], attention)
    q_concat = run.writer.get(op.inputs[0])
    if append is None or q_concat is None or run.ops[q_concat].kind != "concat":
        return None
    found = {"append": append, "q_concat": q_concat}
    for name, reader, operand, kind in _WRITERS:
        value = run.ops[found[reader]].inputs[operand]
        writer = run.writer.get(value)
        if writer is None or run.ops[writer].kind != kind or run.sole_reader(value) != found[reader]:
            return None
        found[name] = writer
    of = LatentOps(**found)
    return of if _fit(run, of, attention) else None


def _fit(run: Run, of: LatentOps, attention: int) -> bool:
    """Whether the parts are cut and joined as the kernel does it."""
    a, absorb, norm = (run.ops[i].attrs for i in (attention, of.absorb, of.norm))
    q_rope, k_rope = (run.ops[i] for i in (of.q_rope, of.k_rope))
    cuts = [run.ops[i].attrs for i in (of.q_slice, of.q_part, of.kv_slice, of.kv_part)]
    append = run.ops[of.append].attrs
    assert isinstance(a, Attention) and isinstance(absorb, HeadLinear) and isinstance(norm, RmsNorm)
    assert isinstance(q_rope.attrs, Rope) and isinstance(append, KvAppend)
    nope, rank, turned = absorb.in_features, absorb.out_features, q_rope.attrs.head_dim
    joins = [run.ops[i] for i in (of.q_concat, of.kv_concat)]
    sources = [run.ops[i].inputs[0] for i in (of.q_slice, of.q_part, of.kv_slice, of.kv_part)]
    return (
        cuts == [Slice(0, nope), Slice(nope, nope + turned), Slice(0, rank), Slice(rank, rank + turned)]
        and sources[0] == sources[1]
        and sources[2] == sources[3]
        and all(isinstance(j.attrs, Concat) and len(j.inputs) == 2 for j in joins)
        and (norm.groups, norm.width) == (1, rank)
        and absorb.heads == q_rope.attrs.heads == a.heads
        and q_rope.inputs[1:] == k_rope.inputs[1:]
        and replace(q_rope.attrs, heads=1) == k_rope.attrs
        and (append.heads, append.head_dim) == (1, rank + turned)
    )


@dataclass(frozen=True)
class LatentOperands:
    """The launches' operands."""

    q: Operand
    kv: Operand
    norm: Operand
    cos: Operand
    sin: Operand
    absorb: Operand
    y: Operand
    cache: Operand


def latents_to_cache(
    of: LatentOperands,
    norm: RmsNorm,
    rope: Rope,
    absorb: HeadLinear,
    weight_format: str,
    cache: DType,
    block: int,
    rows: int,
    pairs: Pairs | None = None,
) -> GpuCode:
    """For exactly ``rows`` rows, at most GEMV_ROWS: rotations, the norm and the cache; then the absorbed projection.
    block: elements of a block of the cache. pairs: what adapters add to the projection."""
    heads, nope, rank, turned = absorb.heads, absorb.in_features, absorb.out_features, rope.head_dim
    to_cache = launch(
        "heads",
        "latents_to_cache",
        f"latents_{heads}x{nope}+{turned}_{cache}",
        (ROWS, GridAxis(heads + 1), ONE),
        {
            "q": ("*fp32", of.q),
            "kv": ("*fp32", of.kv),
            "norm": ("*fp32", of.norm),
            "cos": ("*fp32", of.cos),
            "sin": ("*fp32", of.sin),
            "positions": ("*i32", Operand("step", name="positions")),
            "slots": ("*i32", Operand("step", name="slots")),
            "y": ("*fp32", of.y),
            "cache": (CACHE_TYPES[cache], of.cache),
            "slot_blocks": ("i32", Operand("slot_blocks")),
        },
        {
            "HEADS": heads,
            "NOPE": nope,
            "RANK": rank,
            "DIM": turned,
            "HALF": rope.rotary_dim // 2,
            "OFFSET": rope.offset,
            "STYLE": rope.style,
            "EPS": norm.eps,
            "WEIGHT_OFFSET": norm.weight_offset,
            "PADDED": power_of_two(turned),
            "RANK_PADDED": power_of_two(rank),
            "BLOCK": block,
        },
        warps=1,
    )
    stem = f"absorb_{weight_format}_n{rank}_k{nope}"
    matrix = Matrix(of.absorb, None, of.y, rank)
    before, added, size = pairs_of_gemv(pairs, of.q, nope, rows, 0, heads=heads, x_gap=turned)
    gaps = (turned, turned)
    product = linear_gemv(stem, of.q, (matrix,), nope, weight_format, rows, heads=heads, head_gaps=gaps, pairs=added)
    return GpuCode((to_cache, *before, product), size)
