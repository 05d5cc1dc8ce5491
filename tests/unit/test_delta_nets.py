"""Gated delta nets: recognised by their numbers, lowered with their states, their projections cut by rows."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from hetcomp import frontend
from hetcomp.adapters.packed_pairs import viewed_pairs
from hetcomp.adapters.pair_stack import PairStack
from hetcomp.frontend.checkpoint import viewed, viewed_shape
from hetcomp.frontend.recognise_delta_net import delta_net_form
from hetcomp.ir.native_format import native_format
from hetcomp.ir.ops import CausalConv, GatedDelta, Glu, RmsNorm
from hetcomp.ir.plan import CheckpointTensor, Quantised, Value, ValueKind, WeightSource
from hetcomp.ir.types import DType, TensorType
from hetcomp.passes.choose_formats import weight_role
from hetcomp.quantised_numbers import QuantisedNumbers
from tests.reference import tiny_models

BOUNDS = {"context_length": 16, "max_batch": 3, "max_tokens": 8, "max_logit_rows": 4}


@functools.cache
def imported(name, odd=False):
    return frontend.load(tiny_models.build(name, odd), **BOUNDS)


def layer_ops(name, odd=False):
    plan = imported(name, odd).plan
    return plan.template("layer_0"), {op.role: op for op in plan.template("layer_0").ops}


def delta_net(kind, **fields: int):
    config = tiny_models.config({"Qwen3Next": "qwen3_next", "Qwen3_5": "qwen3_5"}[kind], **fields)
    made = {"Qwen3Next": Qwen3NextGatedDeltaNet, "Qwen3_5": Qwen3_5GatedDeltaNet}[kind](config, 0)
    return made.float().eval()


# ---------------------------------------------------------------- recognising


@pytest.mark.parametrize("kind", ["Qwen3Next", "Qwen3_5"])
@pytest.mark.parametrize(("keys", "values", "width"), [(1, 4, 2), (3, 3, 3), (2, 4, 4)])
@torch.no_grad()
def test_delta_nets_are_recognised(kind, keys, values, width):
    sizes = {"linear_num_key_heads": keys, "linear_num_value_heads": values, "linear_conv_kernel_dim": width}
    form = delta_net_form(delta_net(kind, **sizes, linear_key_head_dim=9, linear_value_head_dim=7))
    assert form is not None
    assert (form.conv_function, form.l2_eps, form.norm_offset) == ("silu", 1e-6, 0.0)
    assert form.scale == pytest.approx(9**-0.5)


class _Doubled(Qwen3_5GatedDeltaNet):
    """Writes twice as much into its state as its parameters say."""

    def forward(self, hidden_states, **kwargs: object):
        self.in_proj_b.weight.data += 1
        out = super().forward(hidden_states, **kwargs)
        self.in_proj_b.weight.data -= 1
        return out


class _Swapped(Qwen3_5GatedDeltaNet):
    """Its keys are queries and its queries keys."""

    def forward(self, hidden_states, **kwargs: object):
        weight, size = self.in_proj_qkv.weight.data, self.key_dim
        self.in_proj_qkv.weight.data = torch.cat([weight[size : 2 * size], weight[:size], weight[2 * size :]])
        out = super().forward(hidden_states, **kwargs)
        self.in_proj_qkv.weight.data = weight
        return out


class _LookingAhead(Qwen3_5GatedDeltaNet):
    """Sees the next token's projection."""

    def forward(self, hidden_states, **kwargs: object):
        return super().forward(hidden_states.roll(-1, 1), **kwargs)


@pytest.mark.parametrize("kind", [_Doubled, _Swapped, _LookingAhead])
@torch.no_grad()
def test_what_computes_something_else_is_not_replaced(kind):
    assert delta_net_form(kind(tiny_models.config("qwen3_5"), 0).float().eval()) is None


@torch.no_grad()
def test_parts_of_another_kind_are_not_replaced():
    module = delta_net("Qwen3_5")
    channels = module.conv1d.in_channels
    module.conv1d = nn.Conv1d(channels, channels, 1, groups=channels, bias=False)
    assert delta_net_form(module) is None
    assert delta_net_form(nn.Linear(2, 2)) is None


# ---------------------------------------------------------------- lowering


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_moe", "qwen3_5"])
def test_ops_and_states_of_a_layer(name):
    template, ops = layer_ops(name)
    config = tiny_models.config(name)
    k_heads, v_heads = config.linear_num_key_heads, config.linear_num_value_heads
    channels = (2 * k_heads + v_heads) * 16
    assert ops["attn.conv"].attrs == CausalConv(channels, 4, "silu")
    assert ops["attn.delta"].attrs == GatedDelta(k_heads, v_heads, 16, 16, 0.25, 1e-6)
    assert ops["attn.out_norm"].attrs == RmsNorm(16, 1e-6, v_heads)
    assert ops["attn.out_gate"].attrs == Glu(v_heads * 16, "silu")
    rows = {role: ops[f"attn.{role}"].attrs.out_features for role in ("qkv", "z", "a", "b")}
    assert rows == {"qkv": channels, "z": v_heads * 16, "a": v_heads, "b": v_heads}
    states = {v.id: v.type.shape for v in template.values if v.kind is ValueKind.STATE}
    assert states == {"cache.conv": ("slots", 3, channels), "cache.delta": ("slots", v_heads, 16, 16)}
    assert not any(v.type.is_cache for v in template.values)
    assert [weight_role(ops[f"attn.{r}"]) for r in ("a", "b", "qkv")] == ["router", "router", "attention"]


def test_projections_of_key_heads_are_cut_into_what_is_read():
    """Qwen3-Next has q, k, v and z of each key head behind each other, and b and a."""
    found = imported("qwen3_next", odd=True)
    weights = {v.id: v for v in found.plan.values if v.fqn == "model.layers.0.linear_attn.in_proj_qkvz.weight"}
    qkv, z = weights.values()
    each, starts = 2 * 11 + 4 * 13, range(3)  # a head's 11 of q, 11 of k, 2 * 13 of v and as many of z
    runs = [(each * h, each * h + 11) for h in starts] + [(each * h + 11, each * h + 22) for h in starts]
    runs += [(each * h + 22, each * h + 48) for h in starts]
    assert qkv.view.row_runs == tuple(runs)
    assert z.view.row_runs == tuple((each * h + 48, each * (h + 1)) for h in starts)
    whole = tiny_models.build("qwen3_next", True).get_parameter(qkv.fqn).detach().numpy()
    read = np.concatenate([found.checkpoint.read(v) for v in weights.values()])
    np.testing.assert_array_equal(
        read, np.concatenate([whole[a:b] for v in weights.values() for a, b in v.view.row_runs])
    )


def test_queries_and_their_gates_are_linear_layers_of_their_own():
    ops = {op.role: op for op in imported("qwen3_5", odd=True).plan.template("layer_1").ops}
    assert (ops["attn.q"].attrs.out_features, ops["attn.gate"].attrs.out_features) == (120, 120)
    assert ops["attn.q"].attrs.bias and "attn.slice" not in ops


def test_other_cuts_stay_cuts():
    """MLA's: kernels for GPUs know them as they are."""
    roles = [op.role for op in imported("deepseek_v3").plan.template("layer_0").ops]
    assert roles.count("attn.slice") == 4


# ---------------------------------------------------------------- runs of rows


@st.composite
def runs_of(draw):
    rows = draw(st.integers(2, 24))
    edges = sorted(draw(st.sets(st.integers(0, rows), min_size=2, max_size=6)))
    pieces = list(zip(edges[:-1:2], edges[1::2], strict=False))
    return rows, tuple(draw(st.permutations(pieces)))


@settings(max_examples=40, deadline=None)
@given(runs_of(), st.integers(1, 3))
def test_a_weight_of_runs_is_those_rows(case, groups):
    """Of numbers, of codes, and of what an adapter adds."""
    rows, runs = case
    view = WeightSource("plain", (), row_runs=runs)
    random = np.random.default_rng(rows)
    numbers = random.standard_normal((rows, 32 * groups)).astype(np.float32)
    wanted = [row for start, stop in runs for row in range(start, stop)]
    np.testing.assert_array_equal(viewed(numbers, view), numbers[wanted])
    np.testing.assert_array_equal(viewed(numbers[:, 0], view), numbers[wanted, 0])
    scales = random.uniform(0.5, 1, (rows, groups)).astype(np.float32)
    coded = QuantisedNumbers("q4", random.integers(0, 16, numbers.shape).astype(np.uint8), scales)
    np.testing.assert_array_equal(coded.cut(0, runs).to_f32(), coded.to_f32()[wanted])
    stack = PairStack(random.standard_normal((1, 2, 4)), random.standard_normal((1, rows, 2)), 2, 1.0)
    pairs = viewed_pairs(stack, view)
    np.testing.assert_allclose(pairs.b[0] @ pairs.a[0], (stack.b[0] @ stack.a[0])[wanted])
    tensor = CheckpointTensor("f", "w", "F32", numbers.shape, 0, numbers.nbytes)
    source = WeightSource("plain", (tensor,), row_runs=runs)
    assert viewed_shape(source) == (len(wanted), 32 * groups)
    assert viewed_shape(WeightSource("plain", (tensor,), row_runs=((0, rows + 1),))) is None


@pytest.mark.parametrize(("head", "fits"), [(128, True), (64, True), (56, False)])
def test_blocks_of_fp8_survive_runs_of_whole_panels(head, fits):
    """Blocks of 128 rows: runs of 64 rows are whole panels of 16, each in one block; runs of 56 are not."""
    shape = (4 * head, 256)
    parts = (("codes", CheckpointTensor("f", "w", "F8_E4M3", shape, 0, 0)),)
    quantised = Quantised("fp8", "FP8", (128, 128), parts, "fp8", "", 8.0)
    tensor = CheckpointTensor("f", "w", "F8_E4M3", shape, 0, 0, quantised)
    source = WeightSource("plain", (tensor,), row_runs=((0, head), (3 * head, 4 * head)))
    value = Value("w", TensorType(DType.F32, (2 * head, 256)), ValueKind.WEIGHT, source=source)
    native = native_format(value, "panels16")
    assert native is not None and native.format == ("fp8" if fits else "q8")
