"""A small Qwen3-MoE-like plan built by hand, and a machine to plan it for: for tests of passes, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hetcomp.hardware.figures import BandwidthPoint, Gpu, GpuRate, KernelRate, NumaNode, Source
from hetcomp.hardware.profile import HardwareProfile
from hetcomp.ir import ops
from hetcomp.ir.plan import (
    Call,
    CheckpointTensor,
    ModelInfo,
    Op,
    Plan,
    Template,
    Value,
    ValueKind,
    WeightSource,
)
from hetcomp.ir.types import Dim, DType, Shape, TensorType
from hetcomp.passes.context import Context, FormatRequest

HIDDEN, EXPERTS, TOP_K, WIDTH, VOCAB, HEADS, HEAD = 64, 8, 2, 32, 128, 4, 16
GIB = 1 << 30


def _value(id: str, shape: Shape, kind: ValueKind = ValueKind.ACT, dtype: DType = DType.F32) -> Value:
    return Value(id, TensorType(dtype, shape), kind, fqn=None if kind is ValueKind.ACT else id)


def layer_template() -> Template:
    """norm, q/k/v, cache, attention, o, residual, norm, router, route, experts, residual."""
    row = HEADS * HEAD
    weight = ValueKind.WEIGHT
    cache: Shape = ("slots", HEADS, "context", HEAD)
    params = (
        _value("x", ("T", HIDDEN)),
        _value("norm.w", (HIDDEN,), weight),
        *(_value(f"{n}.w", (row, HIDDEN), weight) for n in "qkv"),
        _value("o.w", (HIDDEN, row), weight),
        _value("k.cache", cache, ValueKind.STATE),
        _value("v.cache", cache, ValueKind.STATE),
        _value("router.w", (EXPERTS, HIDDEN), weight),
        _value("gate_up.w", (EXPERTS, 2 * WIDTH, HIDDEN), weight),
        _value("down.w", (EXPERTS, HIDDEN, WIDTH), weight),
    )
    acts = (
        *(_value(n, ("T", HIDDEN)) for n in ("normed", "o", "mid", "moe", "y")),
        *(_value(n, ("T", row)) for n in ("q", "k", "v", "attended")),
        _value("logits", ("T", EXPERTS)),
        _value("ids", ("T", TOP_K), dtype=DType.I32),
        _value("weights", ("T", TOP_K)),
    )
    linear = ops.Linear(HIDDEN, row)
    body = (
        Op("norm", ops.RmsNorm(HIDDEN, 1e-6), ("x", "norm.w"), ("normed",), role="attn.norm"),
        Op("q", linear, ("normed", "q.w"), ("q",), role="attn.q"),
        Op("k", linear, ("normed", "k.w"), ("k",), role="attn.k"),
        Op("append_k", ops.KvAppend(HEADS, HEAD), ("k", "k.cache"), (), role="attn.kv_append"),
        Op("v", linear, ("normed", "v.w"), ("v",), role="attn.v"),
        Op("append_v", ops.KvAppend(HEADS, HEAD), ("v", "v.cache"), (), role="attn.kv_append"),
        Op(
            "attend",
            ops.Attention(HEADS, HEADS, HEAD, HEAD, 0.25),
            ("q", "k.cache", "v.cache"),
            ("attended",),
            role="attn.core",
        ),
        Op("o", ops.Linear(row, HIDDEN), ("attended", "o.w"), ("o",), role="attn.o"),
        Op("mid", ops.Add(), ("x", "o"), ("mid",), role="residual"),
        Op("router", ops.Linear(HIDDEN, EXPERTS), ("mid", "router.w"), ("logits",), role="moe.router"),
        Op(
            "route",
            ops.Route(EXPERTS, TOP_K, "softmax", True),
            ("logits",),
            ("ids", "weights"),
            role="moe.route",
        ),
        Op(
            "experts",
            ops.MoeExperts(EXPERTS, TOP_K, HIDDEN, WIDTH),
            ("mid", "ids", "weights", "gate_up.w", "down.w"),
            ("moe",),
            role="moe.experts",
        ),
        Op("y", ops.Add(), ("mid", "moe"), ("y",), role="residual"),
    )
    return Template("layer_0", (*params, *acts), body, tuple(p.id for p in params), ("y",))


def tiny_plan(layers: int = 2) -> Plan:
    """embed, ``layers`` calls of the layer, select_rows and lm_head; embeddings tied."""
    table = _value("embed.w", (VOCAB, HIDDEN), ValueKind.WEIGHT)
    token_ids = _value("ids", ("T",), ValueKind.INPUT, DType.I32)
    logits = _value("logits", ("R", VOCAB), ValueKind.OUTPUT)
    prologue = Template(
        "prologue",
        (token_ids, table, _value("h", ("T", HIDDEN))),
        (Op("embed", ops.Embed(VOCAB, HIDDEN), ("ids", "embed.w"), ("h",), role="embed"),),
        ("ids", "embed.w"),
        ("h",),
    )
    epilogue = Template(
        "epilogue",
        (_value("h", ("T", HIDDEN)), table, _value("rows", ("R", HIDDEN)), logits),
        (
            Op("select", ops.SelectRows(), ("h",), ("rows",), role="select_rows"),
            Op("head", ops.Linear(HIDDEN, VOCAB), ("rows", "embed.w"), ("logits",), role="lm_head"),
        ),
        ("h", "embed.w"),
        ("logits",),
    )
    layer = layer_template()
    values = [token_ids, table, _value("h0", ("T", HIDDEN))]
    calls = [Call("prologue", None, ("ids", "embed.w"), ("h0",))]
    for i in range(layers):
        own = [replace(layer.value(p), id=f"l{i}.{p}", fqn=f"l{i}.{p}") for p in layer.params[1:]]
        values += [*own, _value(f"h{i + 1}", ("T", HIDDEN))]
        calls.append(Call("layer_0", i, (f"h{i}", *(v.id for v in own)), (f"h{i + 1}",)))
    calls.append(Call("epilogue", None, (f"h{layers}", "embed.w"), ("logits",)))
    return Plan(
        ModelInfo("tiny", "TinyForCausalLM", "tiny", VOCAB, HIDDEN, layers, 64),
        (Dim("T", 1, 16), Dim("R", 1, 4), Dim("slots", 1, 2), Dim("context", 64, 64)),
        (*values, logits),
        (prologue, layer, epilogue),
        tuple(calls),
    )


class HandTarget:
    """A KernelTarget with round numbers: everything packed is 16-row panels, experts need 4 KiB of workspace."""

    def workspace_bytes(self, op: Op, template: Template, dims: Mapping[str, int]) -> int:
        return 4096 if op.kind == "moe_experts" else 0

    def gpu_refusal(self, op: Op, template: Template) -> str | None:
        return None

    def weight_layout(self, op: Op, operand: int, act_order: bool) -> str:
        return "row_major" if op.kind == "rms_norm" else "panels16"

    def packed_bytes(self, value: Value) -> int:
        return value.type.numel({}) * (2 if value.format == "bf16" else 4)


class HandCheckpoint:
    """A checkpoint that has every weight in ``dtype``."""

    origin = "by hand"

    def __init__(self, dtype: str = "BF16") -> None:
        self.dtype = dtype

    def source(self, value: Value) -> WeightSource:
        shape = tuple(int(d) for d in value.type.shape)
        return WeightSource("plain", (CheckpointTensor("f", value.fqn or "", self.dtype, shape, 0, 0),))


def gpu(memory: int = 2 * GIB, gb_per_s: float = 600.0, link: float = 20.0) -> Gpu:
    """A GPU of the hand-built machine."""
    return Gpu(
        name="hand-gpu",
        memory_bytes=memory,
        compute_capability=(8, 9),
        gb_per_s=gb_per_s,
        link_gb_per_s=link,
        rates=(GpuRate(weight_format="bf16", tflops=50.0, source=Source.MEASURED),),
        handshake_us=6.0,
        launch_us=2.0,
        source=Source.MEASURED,
    )


def profile(
    nodes: int = 1,
    memory: int = 8 * GIB,
    bandwidths: tuple[float, ...] = (30.0, 30.0),
    gpus: tuple[Gpu, ...] = (),
) -> HardwareProfile:
    """A machine with 4 cores a node."""
    return HardwareProfile(
        name="hand",
        cpu="hand",
        isas=("avx2", "avx512"),
        threads=4 * nodes,
        logical_cpus=4 * nodes,
        nodes=tuple(
            NumaNode(
                id=i,
                cores=4,
                memory_bytes=memory,
                available_bytes=memory,
                read_bandwidth=(BandwidthPoint(threads=4, gb_per_s=bandwidths[i]),),
                source=Source.MEASURED,
            )
            for i in range(nodes)
        ),
        rates=tuple(
            KernelRate(
                isa="avx512",
                weight_format=f,
                gflops_per_core=50.0,
                bandwidth_fraction=1.0,
                source=Source.MEASURED,
            )
            for f in ("f32", "bf16")
        ),
        barrier_us=1.0,
        gpus=gpus,
    )


def avx2_machine(nodes: int, memory: tuple[int, int] = (8 * GIB, 8 * GIB)) -> HardwareProfile:
    """Cores with AVX2 on one node, or on two of which the first reads twice as fast; ``memory``: free bytes of each."""
    made = profile(nodes=nodes, bandwidths=(30.0, 15.0))
    return made.model_copy(
        update={
            "isas": ("avx2",),
            "rates": tuple(rate.model_copy(update={"isa": "avx2"}) for rate in made.rates),
            "nodes": tuple(n.model_copy(update={"available_bytes": memory[n.id]}) for n in made.nodes),
        }
    )


def context(formats: str | Mapping[str, str] = "bf16", dtype: str = "BF16", **machine: object) -> Context:
    """A context for the tiny plan."""
    return Context(
        profile(**machine),  # type: ignore[arg-type]
        HandCheckpoint(dtype),
        HandTarget(),
        FormatRequest.parse(formats),
    )
