"""The GPU backend: every op kind as launches of Triton kernels (``codegen_templates/gpu``)."""

from __future__ import annotations

from collections.abc import Callable

from hetcomp.backends.gpu import attention, experts, linear, linear_attention, rowwise
from hetcomp.backends.gpu.kernels import GpuCode, GpuRequest
from hetcomp.backends.gpu.words import PER_WORD
from hetcomp.backends.operand_layouts import refused_operand
from hetcomp.errors import HetcompError
from hetcomp.ir.ops import Attention, GatedDelta
from hetcomp.ir.types import DType

_EMITTERS: dict[str, Callable[[GpuRequest], GpuCode]] = {
    "embed": rowwise.embed,
    "rms_norm": rowwise.rms_norm,
    "layer_norm": rowwise.layer_norm,
    "linear": linear.linear,
    "head_linear": linear.linear,
    "rope_table": rowwise.rope_table,
    "rope": rowwise.rope,
    "kv_append": attention.kv_append,
    "attention": attention.attention,
    "causal_conv": linear_attention.causal_conv,
    "gated_delta": linear_attention.gated_delta,
    "route": rowwise.route,
    "moe_experts": experts.moe_experts,
    "glu": rowwise.glu,
    "activation": rowwise.activation,
    "add": rowwise.add,
    "mul": rowwise.mul,
    "scale": rowwise.scale,
    "slice": rowwise.slice_,
    "concat": rowwise.concat,
    "select_rows": rowwise.select_rows,
}


class TritonBackend:
    """Emits launches for every kind but ``transfer`` and ``aten``. Weights in the packed bytes of
    :mod:`hetcomp.backends.packing`, activations f32 (bf16 where all readers round them), KV cache bf16, f32 or fp8."""

    name = "triton"

    def score(self, request: GpuRequest) -> int:
        """100 for an op that the kernels can do; else 0."""
        return 0 if self.refusal(request) else 100

    def refusal(self, request: GpuRequest) -> str | None:
        """Why the request cannot be served, one sentence; None if it can."""
        kind = request.op.kind
        if kind not in _EMITTERS:
            return f"there is no GPU kernel for '{kind}'."
        refusal = refused_operand(kind, request.inputs, PER_WORD)
        if refusal is not None:
            return refusal
        forms = {str(value.format) for value in request.inputs[3:5]} if kind == "moe_experts" else set()
        if len(forms) > 1 and "f32" in forms:
            return f"gate_up and down are {' and '.join(sorted(forms))}, between which numbers are kept in other types."
        attrs = request.op.attrs
        if isinstance(attrs, GatedDelta) and attrs.k_dim > linear_attention.MAX_KEY_DIM:
            widest = linear_attention.MAX_KEY_DIM
            return f"keys of {attrs.k_dim} in a recurrent state are too wide; expected at most {widest} on a GPU."
        return _cache_refusal(request)

    def workspace_bytes(self, request: GpuRequest) -> int:
        """Scratch memory of the op's launches."""
        return self.emit(request).workspace_bytes

    def emit(self, request: GpuRequest) -> GpuCode:
        """The op's launches. Raises HetcompError naming the op if there is no kernel for it."""
        self.require(request)
        return _EMITTERS[request.op.kind](request)

    def require(self, request: GpuRequest) -> None:
        """Raises HetcompError naming the op if there is no kernel for it."""
        refusal = self.refusal(request)
        if refusal:
            raise HetcompError(f"The GPU backend cannot compile {request.op.origin or request.op.id}: {refusal}")


def _cache_refusal(request: GpuRequest) -> str | None:
    attrs = request.op.attrs
    if attrs.kind not in ("kv_append", "attention"):
        return None
    both = isinstance(attrs, Attention) and not attrs.shared_kv
    caches = request.inputs[1 : 3 if both else 2]
    for cache in caches:
        if cache.type.dtype not in attention.CACHE_TYPES:
            expected = " or ".join(attention.CACHE_TYPES)
            return f"state {cache.fqn or cache.id} has dtype {cache.type.dtype}; expected {expected} on a GPU."
    if isinstance(attrs, Attention) and caches[0].type.dtype is DType.F32 and attrs.head_dim > attention.MAX_F32_DIM:
        return f"heads of {attrs.head_dim} in an f32 cache are too wide for a GPU; expected a bf16 cache."
    if len({cache.type.dtype for cache in caches}) > 1:
        return "the caches of keys and values have different dtypes."
    return None
