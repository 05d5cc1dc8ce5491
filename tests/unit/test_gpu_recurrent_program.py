"""A GPU's program with states of recurrences: a buffer of their own, beside a KV cache or without one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hetcomp.artifact.gpu_program_file import write_gpu_program
from hetcomp.artifact.weight_files import WeightRecord
from hetcomp.backends import packing
from hetcomp.backends.gpu.gpu_program import GpuProgram, lower_programs
from hetcomp.backends.operand_layouts import layouts_for
from hetcomp.ir import ops
from hetcomp.ir.kv_pool import KvPool
from hetcomp.ir.plan import Call, Op, Plan, Template, Value, ValueKind
from hetcomp.ir.types import DType, TensorType
from hetcomp.passes.pins import parse_pin
from hetcomp.passes.pipeline import run_pipeline
from tests.reference.plan_builder import HIDDEN, HandTarget, context, gpu, tiny_plan

K_HEADS, V_HEADS, K_DIM, V_DIM, WIDTH = 2, 4, 8, 16, 4
COLUMNS = 2 * K_HEADS * K_DIM + V_HEADS * V_DIM


def linear_template() -> Template:
    """norm, projections, convolution, gated delta rule, gated norm, output, residual."""

    def value(id: str, *shape: int | str, kind: ValueKind = ValueKind.ACT) -> Value:
        return Value(id, TensorType(DType.F32, shape), kind, fqn=None if kind is ValueKind.ACT else id)

    inner, weight, state = V_HEADS * V_DIM, ValueKind.WEIGHT, ValueKind.STATE
    projections = {"qkv": COLUMNS, "z": inner, "a": V_HEADS, "b": V_HEADS}
    params = (
        value("x", "T", HIDDEN),
        value("norm.w", HIDDEN, kind=weight),
        *(value(f"{name}.w", rows, HIDDEN, kind=weight) for name, rows in projections.items()),
        value("conv.w", COLUMNS, 1, WIDTH, kind=weight),
        value("a_log", V_HEADS, kind=weight),
        value("dt_bias", V_HEADS, kind=weight),
        value("heads.w", V_DIM, kind=weight),
        value("o.w", HIDDEN, inner, kind=weight),
        value("conv.state", "slots", WIDTH - 1, COLUMNS, kind=state),
        value("delta.state", "slots", V_HEADS, K_DIM, V_DIM, kind=state),
    )
    acts = (
        *(value(name, "T", HIDDEN) for name in ("normed", "o", "y")),
        *(value(name, "T", rows) for name, rows in {**projections, "conv": COLUMNS}.items()),
        *(value(name, "T", inner) for name in ("delta", "heads", "gated")),
    )
    delta = ops.GatedDelta(K_HEADS, V_HEADS, K_DIM, V_DIM, K_DIM**-0.5, 1e-6)
    body = (
        Op("norm", ops.RmsNorm(HIDDEN, 1e-6), ("x", "norm.w"), ("normed",), role="attn.norm"),
        *(
            Op(name, ops.Linear(HIDDEN, rows), ("normed", f"{name}.w"), (name,), role=f"attn.{name}")
            for name, rows in projections.items()
        ),
        Op("conv", ops.CausalConv(COLUMNS, WIDTH), ("qkv", "conv.w", "conv.state"), ("conv",), role="attn.conv"),
        Op("delta", delta, ("conv", "a", "b", "a_log", "dt_bias", "delta.state"), ("delta",), role="attn.core"),
        Op("heads", ops.RmsNorm(V_DIM, 1e-6, V_HEADS), ("delta", "heads.w"), ("heads",), role="attn.norm"),
        Op("gated", ops.Glu(inner), ("z", "heads"), ("gated",), role="attn.gate"),
        Op("o", ops.Linear(inner, HIDDEN), ("gated", "o.w"), ("o",), role="attn.o"),
        Op("y", ops.Add(), ("x", "o"), ("y",), role="residual"),
    )
    return Template("linear", (*params, *acts), body, tuple(p.id for p in params), ("y",))


def mixed_plan(*, attention: bool) -> Plan:
    """Two layers of linear attention behind the tiny plan's first layer, or instead of it."""
    plan, linear = tiny_plan(1), linear_template()
    prologue, layer, epilogue = plan.calls
    values, calls, last = list(plan.values), [prologue], "h0"
    if attention:
        calls.append(layer)
        last = "h1"
    else:
        values = [v for v in values if not v.id.startswith("l0.") and v.id != "h1"]
    for i in (1, 2):
        own = [replace(linear.value(p), id=f"l{i}.{p}", fqn=f"l{i}.{p}") for p in linear.params[1:]]
        result = f"r{i}"
        values += [*own, replace(linear.value("y"), id=result)]
        calls.append(Call("linear", i, (last, *(v.id for v in own)), (result,)))
        last = result
    calls.append(replace(epilogue, args=(last, *epilogue.args[1:])))
    templates = [t for t in plan.templates if attention or t.name != "layer_0"]
    return replace(plan, values=tuple(values), templates=(*templates, linear), calls=tuple(calls))


class Target(HandTarget):
    """With the layouts that the GPU's kernels read."""

    def weight_layout(self, op: Op, operand: int, act_order: bool) -> str:
        return layouts_for(op.kind, operand)[-1 if act_order else 0]

    def packed_bytes(self, value: Value) -> int:
        return packing.packed_bytes(value)


def lowered(*, attention: bool) -> GpuProgram:
    made = replace(context(gpus=(gpu(),)), use_gpus=True, pins=(parse_pin("*=gpu:0"),), target=Target())
    (program,) = lower_programs(run_pipeline(mixed_plan(attention=attention), made))
    return program


@pytest.fixture(scope="module", params=[True, False], ids=["beside a cache", "alone"])
def program(request: pytest.FixtureRequest) -> GpuProgram:
    return lowered(attention=request.param)


def test_recurrent_states_are_a_buffer_of_their_own(program):
    buffers = {b.name: b for b in program.buffers()}
    has_cache = any(v.type.is_cache for v in program.plan.values if v.kind is ValueKind.STATE)
    assert ("states" in buffers) == has_cache
    pool, end = KvPool.of(program.plan.max_dims()), 0
    assert [v.id for v in program.recurrent] == [f"l{i}.{name}.state" for i in (1, 2) for name in ("conv", "delta")]
    for value in program.recurrent:
        place = program.places[value.id]
        assert place.buffer == "recurrent" and place.offset >= end and place.offset % 256 == 0
        end = place.offset + pool.gpu_bytes(value.type)
        assert pool.gpu_bytes(value.type) == 3 * value.type.bytes({"slots": 1})  # two slots, and the rows of nobody
    assert buffers["recurrent"].kind == "recurrent" and buffers["recurrent"].bytes == end
    assert program.device_bytes(()) >= end


def test_the_runtime_is_told_where_each_state_is(program, tmp_path: Path):
    records = [WeightRecord(v.id, "weights.safetensors", 0, packing.packed_bytes(v), "0" * 16) for v in program.weights]
    entry = write_gpu_program(program, records, (), (), tmp_path)
    document = json.loads((tmp_path / entry["program"]).read_text())
    assert document["schema"] == [5, 1]
    (buffer,) = (b for b in document["buffers"] if b["kind"] == "recurrent")
    sizes = [value.type.bytes({"slots": 1}) for value in program.recurrent]
    assert buffer["recurrent"]["slots"] == 2
    assert [state["slot_bytes"] for state in buffer["recurrent"]["states"]] == sizes
    offsets = {state["offset"] for state in buffer["recurrent"]["states"]}
    used = {
        a["offset"]
        for graph in document["graphs"]
        for node in graph["nodes"]
        for a in node.get("arguments", ())
        if a.get("buffer") == "recurrent"
    }
    assert used == offsets


def test_launches_of_a_layer_of_linear_attention(program):
    """Decode: norm and projections (those of the gates, f32, by themselves), convolution, rule, gated norm, output
    with the residual. Prompts: what is linear or a norm by itself; convolution and its state, the rule in three."""
    decode = next(g for g in program.graphs if g.rows.exact and g.rows.count == 1)
    layer = [node for node in decode.nodes if node.get("layer") == 1]
    assert [node["kernel"].rpartition("_")[0].partition("_")[0] for node in layer] == [
        *("linear", "linear", "causal"),
        *("gated", "gated", "linear"),
    ]
    prompt = next(g for g in program.graphs if not g.rows.exact)
    functions = [prompt.kernels[n["kernel"]].function for n in prompt.nodes if n.get("layer") == 1]
    first = functions.index("causal_conv")
    assert functions[first : first + 6] == [
        *("causal_conv", "leave_state"),
        *("gated_delta_rows", "gated_delta_chunks", "gated_delta_scan"),
        "rms_norm",
    ]
