"""ONNX graphs of a tiny Qwen3.5, dense or with experts: layers of linear and of full attention, as onnxruntime-genai's
builder writes them (0.18, src/python/py/models/builders/qwen.py), and in the other forms that such layers come in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from transformers import PreTrainedModel
from transformers.models.qwen3_5 import Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.models.qwen3_5_moe import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

from tests.reference.onnx_genai_models import MICROSOFT, Builder, Choices

# genai: LinearAttentionGate, LpNormalization and LinearAttention; net, packed: GatedDeltaNet, with queries, keys and
# values apart or in one; plain: gates and norms spelled out, from A_log itself; onnx: that with ONNX's own ops of opset
# 27, which want as many heads of queries as of values; apart: a convolution each for queries, keys and values.
FORMS = ("genai", "net", "packed", "plain", "onnx", "apart")


def model(
    layers: tuple[str, ...] = ("linear_attention", "full_attention", "linear_attention"), experts: int = 0
) -> PreTrainedModel:
    """In float32; with routed experts (two of them for a token) and a shared one behind a gate. Weights are drawn so
    that heads of values stay long: their norm would make rounding errors of others large."""
    kind, of = (Qwen3_5MoeTextConfig, Qwen3_5MoeForCausalLM) if experts else (Qwen3_5TextConfig, Qwen3_5ForCausalLM)
    sizes = {"intermediate_size": 96}
    if experts:
        sizes = {"num_experts": experts, "num_experts_per_tok": 2}
        sizes |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}
    config = kind(
        vocab_size=256,
        hidden_size=64,
        **sizes,
        num_hidden_layers=len(layers),
        layer_types=list(layers),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
        attn_implementation="eager",
        experts_implementation="eager",
    )
    torch.manual_seed(3)
    made = of(config).eval()
    for name, parameter in made.named_parameters():
        if parameter.dim() == 2 or ".experts." in name:
            torch.nn.init.normal_(parameter, std=1.0 if "embed" in name else parameter.shape[-1] ** -0.5)
        elif name.endswith("norm.weight") or name.endswith("dt_bias"):
            torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    return made


class LinearAttentionBuilder(Builder):
    """Writes one such model in one of FORMS. ``attributes`` of the choices are those of its LinearAttention."""

    positions = (3, "batch_size", "sequence_length")

    def __init__(self, of: PreTrainedModel, form: str, attributes: dict[str, Any], bits: int = 32) -> None:
        super().__init__(of, Choices(rotary=False, sized=False, bits=bits))
        self.form, self.extra = form, attributes
        self.opset = 27 if form == "onnx" else 21
        c = of.config
        self.k_heads, self.v_heads = c.linear_num_key_heads, c.linear_num_value_heads
        self.k_dim, self.v_dim = c.linear_key_head_dim, c.linear_value_head_dim
        self.sizes = [self.k_heads * self.k_dim, self.k_heads * self.k_dim, self.v_heads * self.v_dim]
        for name in self.weights:
            if name.endswith("norm.weight") and "linear_attn" not in name:
                self.weights[name] = self.weights[name] + 1

    def linear_layer(self, layer: int) -> bool:
        return bool(self.config.layer_types[layer] == "linear_attention")

    def memory(self, layer: int) -> list[tuple[str, str, list[str | int]]]:
        if not self.linear_layer(layer):
            return super().memory(layer)
        dims = [self.v_dim, self.k_dim] if self.form in ("net", "packed") else [self.k_dim, self.v_dim]
        width = self.config.linear_conv_kernel_dim - 1
        of_conv = {f"conv{part}": size for part, size in self.parts()}
        states = [(kind, [size, width]) for kind, size in of_conv.items()] + [("recurrent", [self.v_heads, *dims])]
        return [(f"past.{layer}.{kind}", f"present.{layer}.{kind}", ["batch_size", *shape]) for kind, shape in states]

    def parts(self) -> list[tuple[str, int]]:
        """The convolutions of a layer and their channels."""
        return list(zip("qkv", self.sizes, strict=True)) if self.form == "apart" else [("", sum(self.sizes))]

    def reshaped(self, name: str, x: str, *shape: int) -> str:
        return self.node(f"{name}/Reshape", "Reshape", [x, self.constant(f"/shape/{shape}", np.array(shape))])

    def attention(self, layer: int, x: str) -> str:
        return self.delta_net(layer, x) if self.linear_layer(layer) else self.gated_attention(layer, x)

    def moe(self, layer: int, x: str) -> str:
        """Routed experts and the shared one, which has a gate of its own."""
        module, base = f"model.layers.{layer}.mlp", f"/model/layers.{layer}/shared_expert"
        weights = {n: self.weights[f"{module}.shared_expert.{n}_proj.weight"] for n in ("gate", "up", "down")}
        gate, up = (self.linear(f"{base}/{n}_proj", x, weights[n]) for n in ("gate", "up"))
        gate = self.node(f"{base}/act/Mul", "Mul", [gate, self.node(f"{base}/act/Sigmoid", "Sigmoid", [gate])])
        made = self.linear(f"{base}/down_proj", self.node(f"{base}/Mul", "Mul", [gate, up]), weights["down"])
        opened = self.linear(f"{base}_gate", x, self.weights[f"{module}.shared_expert_gate.weight"])
        opened = self.node(f"{base}_gate/Sigmoid", "Sigmoid", [opened])
        made = self.node(f"{base}_gate/Mul", "Mul", [made, opened])
        return self.node(f"/model/layers.{layer}/moe/Add", "Add", [super().moe(layer, x), made])

    # ------------------------------------------------ full attention

    def gated_attention(self, layer: int, x: str) -> str:
        """Each head's queries are followed by its gate."""
        config, base, module = self.config, f"/model/layers.{layer}/attn", f"model.layers.{layer}.self_attn"
        q, k, v = (self.linear(f"{base}/{n}_proj", x, self.weights[f"{module}.{n}_proj.weight"]) for n in "qkv")
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        split = self.reshaped(f"{base}/q_gate", q, 0, 0, heads["q"], 2 * self.head_dim)
        halves = self.constant("/sizes/q_gate", np.array([self.head_dim] * 2))
        self.node(f"{base}/q_gate/Split", "Split", [split, halves], outputs=2, axis=-1)
        width = heads["q"] * self.head_dim
        q, gate = (self.reshaped(f"{base}/part{i}", f"{base}/q_gate/Split/output_{i}", 0, 0, width) for i in range(2))
        rows = {}
        for part, row in (("q", q), ("k", k)):
            row = self.head_norm(base, module, part, row, heads[part])
            rows[part] = self.node(
                f"{base}/{part}_rotary",
                "MRotaryEmbedding",
                [row, "position_ids", *self.tables()],
                MICROSOFT,
                rotary_embedding_dim=self.head_dim // 2,
                num_heads=heads[part],
                mrope_section=[2, 1, 1],
                mrope_layout=1,
            )
        caches = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
        made = [f"{base}/GroupQueryAttention/output_0", f"present.{layer}.key", f"present.{layer}.value"]
        counts = {"num_heads": heads["q"], "kv_num_heads": heads["k"], "scale": self.head_dim**-0.5}
        inputs = [rows["q"], rows["k"], v, *caches, self.last, self.total]
        name = f"{base}/GroupQueryAttention"
        self.nodes.append(helper.make_node("GroupQueryAttention", inputs, made, name=name, domain=MICROSOFT, **counts))
        opened = self.node(f"{base}/gate/Sigmoid", "Sigmoid", [gate])
        mixed = self.node(f"{base}/gate/Mul", "Mul", [made[0], opened])
        return self.linear(f"{base}/o_proj", mixed, self.weights[f"{module}.o_proj.weight"])

    # ------------------------------------------------ linear attention

    def delta_net(self, layer: int, x: str) -> str:
        base, module = f"/model/layers.{layer}/linear_attn", f"model.layers.{layer}.linear_attn"
        z, b, a = (self.linear(f"{base}/{n}_proj", x, self.weights[f"{module}.in_proj_{n}.weight"]) for n in "zba")
        rows = self.convolved(layer, base, module, x)
        if self.form in ("net", "packed"):
            made = self.gated_delta_net(layer, base, module, rows, a, b)
        else:
            made = self.linear_attention(layer, base, module, rows, a, b)
        scale = self.constant(f"{module}.norm.weight", self.weights[f"{module}.norm.weight"])
        eps = float(self.config.rms_norm_eps)
        if self.form in ("plain", "onnx"):
            made = self.reshaped(f"{base}/heads", made, 0, 0, self.v_heads, self.v_dim)
            made, _ = self.norm(f"{base}/norm", made, "", f"{module}.norm")
            gate = self.reshaped(f"{base}/z", z, 0, 0, self.v_heads, self.v_dim)
            gate = self.node(f"{base}/silu", "Mul", [gate, self.node(f"{base}/sigmoid", "Sigmoid", [gate])])
            made = self.node(f"{base}/gated", "Mul", [made, gate])
            made = self.reshaped(f"{base}/flat", made, 0, 0, self.sizes[2])
        else:
            made = self.node(f"{base}/GatedRMSNorm", "GatedRMSNorm", [made, scale, z], MICROSOFT, epsilon=eps)
        return self.linear(f"{base}/out_proj", made, self.weights[f"{module}.out_proj.weight"])

    def convolved(self, layer: int, base: str, module: str, x: str) -> list[str]:
        """Queries, keys and values; the row of all of them where the next op takes that."""
        weight, taps = self.weights[f"{module}.in_proj_qkv.weight"], self.weights[f"{module}.conv1d.weight"]
        rows, start = [], 0
        for part, size in self.parts():
            here = slice(start, start + size)
            start += size
            row = self.linear(f"{base}/qkv{part}_proj", x, weight[here])
            row = self.node(f"{base}/qkv{part}/Transpose", "Transpose", [row], perm=[0, 2, 1])
            # Of zeros, as genai writes it.
            zeros = np.zeros(size, np.float32)
            bias = "" if self.form == "onnx" else self.constant(f"{module}.conv1d{part}.bias", zeros)
            name = f"{base}/conv{part}/CausalConvWithState"
            inputs = [row, self.constant(f"{module}.conv1d{part}.weight", taps[here])]
            inputs += [bias, f"past.{layer}.conv{part}"]
            made = [f"{name}/output_0", f"present.{layer}.conv{part}"]
            domain = "" if self.form == "onnx" else MICROSOFT
            kind = "CausalConvWithState"
            self.nodes.append(helper.make_node(kind, inputs, made, name=name, domain=domain, activation="silu"))
            rows.append(self.node(f"{base}/conv{part}/Transpose", "Transpose", made[:1], perm=[0, 2, 1]))
        if self.form in ("apart", "packed"):
            return rows
        sizes = self.constant("/sizes/qkv", np.array(self.sizes))
        self.node(f"{base}/Split", "Split", [rows[0], sizes], outputs=3, axis=-1)
        return [f"{base}/Split/output_{i}" for i in range(3)]

    def gated_delta_net(self, layer: int, base: str, module: str, rows: list[str], a: str, b: str) -> str:
        if len(rows) == 3:
            counts = [(self.k_heads, self.k_dim)] * 2 + [(self.v_heads, self.v_dim)]
            rows = [self.reshaped(f"{base}/heads{i}", rows[i], 0, 0, *counts[i]) for i in range(3)]
        gates = [self.constant(f"{module}.{n}", self.weights[f"{module}.{n}"]) for n in ("A_log", "dt_bias")]
        inputs = [*rows, *[""] * (4 - len(rows)), a, b, f"past.{layer}.recurrent", *gates]
        made = [f"{base}/GatedDeltaNet/output_0", f"present.{layer}.recurrent"]
        kinds = {"gate_activation": "softplus", "beta_activation": "sigmoid", "qk_l2_norm": 1} | self.extra
        name = f"{base}/GatedDeltaNet"
        self.nodes.append(helper.make_node("GatedDeltaNet", inputs, made, name=name, domain=MICROSOFT, **kinds))
        return self.reshaped(f"{base}/flat", made[0], 0, 0, self.sizes[2])

    def linear_attention(self, layer: int, base: str, module: str, rows: list[str], a: str, b: str) -> str:
        q, k = (self.l2_normed(f"{base}/{n}_l2norm", row) for n, row in zip("qk", rows, strict=False))
        scale, heads = self.constant("/scale", np.array(self.k_dim**-0.5, np.float32)), self.k_heads
        q = self.node(f"{base}/q_scaled", "Mul", [q, scale])
        if self.form == "onnx":
            q, k = (self.repeated(f"{base}/{n}_repeated", row) for n, row in (("q", q), ("k", k)))
            heads = self.v_heads
        decay, beta = self.gates(base, module, a, b)
        inputs = [q, k, rows[2], f"past.{layer}.recurrent", decay, beta]
        made = [f"{base}/LinearAttention/output_0", f"present.{layer}.recurrent"]
        kinds = {"q_num_heads": heads, "kv_num_heads": self.v_heads, "scale": 1.0, "update_rule": "gated_delta"}
        domain, name = "" if self.form == "onnx" else MICROSOFT, f"{base}/LinearAttention"
        self.nodes.append(
            helper.make_node("LinearAttention", inputs, made, name=name, domain=domain, **kinds | self.extra)
        )
        return made[0]

    def l2_normed(self, name: str, x: str) -> str:
        heads = self.reshaped(f"{name}/flat", x, 0, 0, self.k_heads, self.k_dim)
        if self.form in ("plain", "onnx"):
            squares = self.node(f"{name}/squares", "Mul", [heads, heads])
            axis = self.constant("/axis/last", np.array([-1]))
            total = self.node(f"{name}/ReduceSum", "ReduceSum", [squares, axis], keepdims=1)
            total = self.node(f"{name}/Add", "Add", [total, self.constant("/l2_eps", np.array(1e-6, np.float32))])
            made = self.node(f"{name}/Div", "Div", [heads, self.node(f"{name}/Sqrt", "Sqrt", [total])])
        else:
            made = self.node(f"{name}/LpNormalization", "LpNormalization", [heads], axis=-1, p=2)
        return self.reshaped(f"{name}/unflat", made, 0, 0, self.k_heads * self.k_dim)

    def repeated(self, name: str, x: str) -> str:
        """A head of keys once for each of its heads of values."""
        times = self.v_heads // self.k_heads
        heads = self.reshaped(f"{name}/apart", x, 0, 0, self.k_heads, 1, self.k_dim)
        shape = self.constant(f"/times/{times}", np.array([1, 1, 1, times, 1]))
        return self.reshaped(f"{name}/joined", self.node(f"{name}/Expand", "Expand", [heads, shape]), 0, 0, -1)

    def gates(self, base: str, module: str, a: str, b: str) -> tuple[str, str]:
        a_log = self.weights[f"{module}.A_log"]
        dt_bias = self.constant(f"{module}.dt_bias", self.weights[f"{module}.dt_bias"])
        if self.form not in ("plain", "onnx"):
            scale = self.constant(f"{module}.neg_exp_A", -np.exp(a_log))
            name = f"{base}/LinearAttentionGate"
            decay = self.node(name, "LinearAttentionGate", [a, dt_bias, scale, b], MICROSOFT, 2)
            return decay, f"{name}/output_1"
        raw = self.constant(f"{module}.A_log", a_log)
        scale = self.node(f"{base}/Neg", "Neg", [self.node(f"{base}/Exp", "Exp", [raw])])
        soft = self.node(f"{base}/Softplus", "Softplus", [self.node(f"{base}/dt", "Add", [a, dt_bias])])
        return self.node(f"{base}/decay", "Mul", [scale, soft]), self.node(f"{base}/beta", "Sigmoid", [b])


def write(path: Path, of: PreTrainedModel, form: str, bits: int = 32, **attributes: Any) -> Path:
    """Writes ``of`` in one of FORMS; ``attributes`` are those of its linear attention. bits: of a weight."""
    onnx.save(LinearAttentionBuilder(of, form, attributes, bits).build(), path)
    return path
