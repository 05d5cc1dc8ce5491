"""Tracing, recognising, lowering and folding: what the Plan of a model looks like."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn

from hetcomp import frontend
from hetcomp.errors import HetcompError
from hetcomp.frontend import hooks, recognise, source, trace
from hetcomp.frontend.fold_layers import fold_layers, unfold_layers
from hetcomp.frontend.lower import lower_to_plan
from hetcomp.frontend.routing import find_routers, route_reference
from hetcomp.ir.ops import Attention, MoeExperts, Rope, Route
from hetcomp.ir.plan import ModelInfo, ValueKind
from hetcomp.ir.verifier import verify
from tests.reference import tiny_models
from tests.sampled_cases import rest

INFO = ModelInfo("tiny", "X", "x", 256, 64, 3, 512)
BOUNDS = {"max_tokens": 8, "max_batch": 2, "context_length": 16, "max_logit_rows": 4}


def traced(name, odd=False):
    config = tiny_models.config(name, odd)
    model_class = getattr(transformers, config.architectures[0])
    return trace.trace(trace.meta_model(model_class, config), 16), config


@functools.cache
def lowered(name, odd=False):
    graph, config = traced(name, odd)
    return lower_to_plan(graph, config, INFO, **BOUNDS)


def only(plan, kind):
    return [op for t in plan.templates for op in t.ops if op.kind == kind]


@pytest.mark.parametrize("name", [*tiny_models.EACH_OP, *rest(tiny_models.OTHERS)])
def test_folding_and_unfolding_are_inverse(name):
    plan = lowered(name)
    folded = fold_layers(plan)
    verify(plan)
    verify(folded)
    assert unfold_layers(folded) == plan
    layers = [t.name for t in folded.templates if t.name.startswith("layer_")]
    two = ("deepseek_v3", "glm4_moe", "gpt_oss", "qwen3_next", "qwen3_5_moe", "qwen3_5")
    kinds = 2 if name in two else 1
    assert layers == [f"layer_{i}" for i in range(kinds)]
    assert [c.layer for c in folded.calls] == [None, *range(len(folded.calls) - 2), None]
    assert folded.calls[0].template == "prologue" and folded.calls[-1].template == "epilogue"


def test_template_names_stand_for_all_layers():
    layer = fold_layers(lowered("qwen3_moe")).template("layer_0")
    q = next(op for op in layer.ops if op.role == "attn.q")
    assert q.id == "attn.q" and q.layer is None and q.origin == "model.layers.*.self_attn.q_proj"
    assert layer.value(q.inputs[1]).fqn == "model.layers.*.self_attn.q_proj.weight"
    assert {v.id for v in layer.values if v.kind is ValueKind.STATE} == {"cache.k", "cache.v"}


ROLES = {
    "qwen3_moe": "attn.norm attn.q attn.q_norm attn.k attn.k_norm attn.v attn.rope attn.rope attn.kv_append "
    "attn.kv_append attn.core attn.o residual moe.norm moe.router moe.route moe.experts residual",
    "deepseek_v3": "attn.norm attn.q_a attn.q_a_norm attn.q_b attn.slice attn.slice attn.kv_a attn.slice "
    "attn.slice attn.kv_a_norm attn.rope attn.rope attn.kv_row attn.kv_append attn.q_absorb attn.q_row "
    "attn.core attn.v_absorb attn.o residual moe.norm moe.router moe.route moe.experts moe.shared.gate "
    "moe.shared.up moe.shared.act moe.shared.down moe.shared.add residual",
    "qwen2_moe": "attn.norm attn.q attn.k attn.v attn.rope attn.rope attn.kv_append attn.kv_append attn.core "
    "attn.o residual moe.norm moe.shared.gate moe.shared.up moe.shared.act moe.shared.down moe.router "
    "moe.route moe.experts moe.shared.expert_gate moe.shared.expert_gate_act moe.shared.mul moe.shared.add "
    "residual",
    "qwen3_5": "attn.norm attn.q attn.gate attn.q_norm attn.k attn.k_norm attn.v attn.rope attn.rope attn.kv_append "
    "attn.kv_append attn.core attn.gate_act attn.out_gate attn.o residual mlp.norm mlp.gate mlp.up mlp.act mlp.down "
    "residual",
    "llama": "attn.norm attn.q attn.k attn.v attn.rope attn.rope attn.kv_append attn.kv_append attn.core "
    "attn.o residual mlp.norm mlp.gate mlp.up mlp.act mlp.down residual",
}


@pytest.mark.parametrize("name", ROLES)
def test_roles(name):
    plan = fold_layers(lowered(name))
    last = [t for t in plan.templates if t.name.startswith("layer_")][-1]
    assert [op.role for op in last.ops] == ROLES[name].split()
    assert [op.role for op in plan.template("prologue").ops] == ["embed", "rope_table"]
    assert [op.role for op in plan.template("epilogue").ops] == ["select_rows", "final_norm", "lm_head"]


def test_tied_weights_are_one_value():
    plan = lowered("qwen3")
    (embed,), (head,) = only(plan, "embed"), [op for op in only(plan, "linear") if op.role == "lm_head"]
    assert embed.inputs[1] == head.inputs[1] == "model.embed_tokens.weight"
    untied = lowered("qwen3", odd=True)
    assert {op.inputs[1] for op in only(untied, "linear") if op.role == "lm_head"} == {"lm_head.weight"}


def test_mla_is_absorbed_with_one_state_a_layer():
    plan = lowered("deepseek_v3")
    states = [v for v in plan.values if v.kind is ValueKind.STATE]
    assert [v.type.shape for v in states] == [("slots", 1, "context", 24 + 8)] * 3
    attrs = only(plan, "attention")[0].attrs
    assert isinstance(attrs, Attention) and attrs.shared_kv
    assert (attrs.heads, attrs.kv_heads, attrs.head_dim, attrs.v_head_dim) == (4, 1, 32, 24)
    # The softmax scale is the expanded one: 1 / sqrt(16 + 8), with yarn's mscale squared for factor 4.
    assert attrs.scale == pytest.approx(24**-0.5 * (0.1 * torch.log(torch.tensor(4.0)).item() + 1) ** 2)


def test_gpt_oss_has_sinks_windows_and_its_activation():
    plan = lowered("gpt_oss")
    attention = [op.attrs for op in only(plan, "attention")]
    assert [a.window for a in attention] == [8, 0, 8, 0] and all(a.sinks for a in attention)
    experts = only(plan, "moe_experts")[0]
    assert isinstance(experts.attrs, MoeExperts)
    assert experts.attrs.function == "swiglu_oai" and experts.attrs.bias
    assert experts.attrs.alpha == pytest.approx(1.702) and experts.attrs.limit == 7.0
    gate_up = plan.value_map()[experts.inputs[3]]
    assert gate_up.view.transpose and gate_up.view.deinterleave and gate_up.type.shape == (8, 128, 64)


@pytest.mark.parametrize(
    ("name", "rotary", "style"),
    [("glm4_moe", 8, "half"), ("minimax_m2", 8, "half"), ("deepseek_v3", 8, "interleaved_to_half")],
)
def test_rotary_forms(name, rotary, style):
    for op in only(lowered(name), "rope"):
        assert isinstance(op.attrs, Rope)
        assert (op.attrs.rotary_dim, op.attrs.style, op.attrs.offset) == (rotary, style, 0)


ROUTES = {
    "qwen3_moe": ("softmax", True, 1, 1.0),
    "qwen2_moe": ("softmax", False, 1, 1.0),
    "mixtral": ("softmax", True, 1, 1.0),
    "olmoe": ("softmax", False, 1, 1.0),
    "deepseek_v3": ("sigmoid", True, 2, 2.5),
    "glm4_moe": ("sigmoid", True, 1, 1.0),
    "gpt_oss": ("topk_softmax", False, 1, 1.0),
    "minimax_m2": ("sigmoid", True, 1, 1.0),
    "phimoe": ("sparse_mixer", False, 1, 1.0),
}


@pytest.mark.parametrize("name", ROUTES)
def test_routers_are_recognised_by_behaviour(name):
    routes = {op.attrs for op in only(lowered(name), "route")}
    assert len(routes) == 1
    route = routes.pop()
    assert isinstance(route, Route)
    assert (route.scoring, route.normalise, route.groups, route.scaling) == ROUTES[name]
    assert route.bias == (route.scoring == "sigmoid")
    if name == "deepseek_v3":
        assert (route.top_groups, route.group_score, route.outside_groups) == (1, "top2", "never")


def test_a_router_that_does_something_else_is_not_taken_for_a_route():
    graph, config = traced("qwen3_moe")
    for node in list(graph.graph.nodes):
        if str(node.target) == "aten.softmax.int":
            with graph.graph.inserting_after(node):
                squared = graph.graph.call_function(torch.ops.aten.mul.Tensor, (node, node))
            squared.meta = dict(node.meta)
            node.replace_all_uses_with(squared, delete_user_cb=lambda user, new=squared: user is not new)
    assert find_routers(graph.graph, config) == {}
    plan = lower_to_plan(graph, config, INFO, **BOUNDS)
    assert not only(plan, "route")
    assert {op.role for op in only(plan, "aten")} == {"moe.route"}


def test_route_reference_prefers_the_lower_expert_among_equals():
    ids, weights = route_reference(torch.zeros(1, 4), None, Route(4, 2, "softmax", True))
    assert ids.tolist() == [[0, 1]] and weights.tolist() == [[0.5, 0.5]]


def test_patches_are_undone_even_after_an_error():
    from transformers.models.qwen3_moe import modeling_qwen3_moe as module

    config = tiny_models.config("qwen3_moe")
    model = trace.meta_model(module.Qwen3MoeForCausalLM, config)
    rope = module.apply_rotary_pos_emb
    with pytest.raises(ZeroDivisionError), hooks.tracing_hooks(model, 64) as found:
        assert module.apply_rotary_pos_emb is not rope
        assert found.rms_norms == 13 and len(found.rope_tables) == 1
        raise ZeroDivisionError
    assert module.apply_rotary_pos_emb is rope
    assert not any("forward" in vars(m) or "_hetcomp_form" in vars(m) for m in model.modules())
    assert model.config._attn_implementation == "eager"


class AlmostRmsNorm(nn.Module):
    def __init__(self, change) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.eps = 1e-6
        self.change = change

    def forward(self, x):
        if self.change == "mean":
            x = x - x.mean(-1, keepdim=True)
        eps = 1e-5 if self.change == "eps" else self.eps
        offset = 1.0 if self.change == "offset" else 0.0
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (self.weight + offset)


@pytest.mark.parametrize(
    ("change", "form"), [("", (1e-6, 0.0)), ("offset", (1e-6, 1.0)), ("mean", None), ("eps", None)]
)
def test_a_norm_is_replaced_only_if_its_numbers_agree(change, form):
    assert recognise.rms_form(AlmostRmsNorm(change)) == form


def test_a_rope_function_is_replaced_only_if_its_numbers_agree():
    table = recognise.RopeTableData((1.0, 0.5, 0.25), 1.0, 6)

    def rotate(sign):
        def function(q, k, cos, sin):
            def one(x):
                a, b = x.chunk(2, -1)
                return x * cos[:, None] + torch.cat([-sign * b, a], -1) * sin[:, None]

            return one(q), one(k)

        return function

    assert recognise.rope_style(rotate(1.0), table, 6) == "half"
    assert recognise.rope_style(rotate(-1.0), table, 6) is None


class InPlace(nn.Module):
    def __init__(self, into_a_view) -> None:
        super().__init__()
        self.into_a_view = into_a_view

    def forward(self, x):
        y = x + 1.0
        (y[:, :2] if self.into_a_view else y).mul_(2.0)
        return y * 3.0


def exported(into_a_view):
    module = InPlace(into_a_view)
    program = torch.export.export(module, (torch.ones(2, 4),), strict=True)
    return module, program.graph_module


def test_in_place_ops_become_functional_or_are_refused():
    module, graph_module = exported(False)
    trace.clean(graph_module.graph)
    graph_module.recompile()
    assert not any(str(n.target).endswith("_.Tensor") for n in graph_module.graph.nodes)
    x = torch.arange(8.0).reshape(2, 4)
    assert torch.equal(graph_module(x)[0], module(x))
    _, graph_module = exported(True)
    with pytest.raises(HetcompError, match=r"mul_"):
        trace.clean(graph_module.graph)


def test_attention_with_an_unknown_operand_is_refused():
    q = torch.zeros(1, 2, 3, 4)
    for extra in ({"position_bias": torch.zeros(3, 3)}, {"is_causal": False}):
        with pytest.raises(HetcompError, match=next(iter(extra))):
            hooks._attention_forward(nn.Identity(), q, q, q, None, **extra)


def test_the_same_model_gives_the_same_plan():
    assert lowered("glm4_moe") == lowered.__wrapped__("glm4_moe")


def test_the_trace_can_be_printed():
    text = traced("qwen3_moe")[0].text()
    assert "hetcomp.moe_experts.default" in text and "model.layers.2.mlp.gate.weight" in text


def test_zoo_configs_resolve_to_causal_models():
    from hetcomp import models_zoo

    for name in (n for n in models_zoo.names() if models_zoo.unsupported(n) is None):
        assert source.resolve(name).model_class.__name__.endswith("ForCausalLM")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_tracing_a_30b_model_takes_less_than_a_minute_and_2_gb():
    """In a process of its own. Its peak is VmHWM: getrusage's ru_maxrss starts at that of the process which started it
    (Linux keeps the larger one over exec), here a worker that has run half of the suite."""
    program = (
        "import re, time; from pathlib import Path; from hetcomp import frontend; start = time.process_time();"
        "got = frontend.load('qwen3-30b-a3b', context_length=4096, max_batch=1, max_tokens=512,"
        " max_logit_rows=64);"
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1];"
        "print(time.process_time() - start, peak, len(got.plan.calls), len(got.plan.templates))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, kilobytes, calls, templates = (float(x) for x in out.stdout.split()[-4:])
    assert seconds < 60 and kilobytes < 2 << 20
    assert (calls, templates) == (50, 3)


def test_frontend_leaves_out_what_it_was_not_asked_for():
    imported = frontend.load("demo-moe", context_length=None, max_batch=1, max_tokens=512, max_logit_rows=64)
    assert imported.unused == () and imported.config["model_type"] == "qwen3_moe"
    assert {op.kind for t in imported.plan.templates for op in t.ops} <= {
        "embed", "rope_table", "rms_norm", "linear", "rope", "kv_append", "attention", "add", "route",
        "moe_experts", "select_rows",
    }  # fmt: skip
