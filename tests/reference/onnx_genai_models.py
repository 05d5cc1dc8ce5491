"""ONNX graphs of tiny models in the ops and names of onnxruntime-genai's builder (src/python/py/models/builders there),
quantised as onnxruntime's matmul_nbits_quantizer packs weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from transformers import PreTrainedModel

_Array = npt.NDArray[Any]
MICROSOFT = "com.microsoft"


@dataclass
class Choices:
    """bits: of weights, 32: not quantised; block: columns of a scale; expert_rows: experts have a scale a row;
    zeros: whether blocks have zero points; scattered: whether their columns are anywhere (GPTQ's act-order);
    as_numbers: of matrices outside experts what their codes stand for, as floats. rotary: by the attention itself;
    joined: q, k and v as one matrix; apart: gate and up of experts as FC1 and FC3; norms_inside: of heads, by the
    attention; sized: the caches' widths are numbers, not names, and those of windows hold all positions."""

    bits: int = 32
    block: int = 32
    zeros: bool = False
    scattered: bool = False
    as_numbers: bool = False
    rotary: bool = True
    joined: bool = False
    quantised_embedding: bool = False
    expert_rows: bool = False
    apart: bool = False
    norms_inside: bool = False
    sized: bool = True
    attributes: dict[str, Any] = field(default_factory=dict)


def quantised(weight: _Array, bits: int, block: int, zeros: bool) -> tuple[_Array, _Array, _Array | None]:
    """Codes u8 [.., N, K * bits / 8], scales f32 [.., N, blocks], zero points u8 [.., N, bytes]; K in whole blocks."""
    block = block or weight.shape[-1]
    *rows, columns = weight.shape
    blocks = np.zeros((*rows, -(-columns // block) * block), np.float32)
    blocks[..., :columns] = weight
    blocks = blocks.reshape(*rows, -1, block)
    top, middle = (1 << bits) - 1, 1 << (bits - 1)
    if zeros:
        low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
        scales = np.maximum((high - low) / top, 1e-6)
        points = np.clip(np.round(-low / scales), 0, top)
    else:
        scales = np.maximum(np.abs(blocks).max(-1) / (middle - 1), 1e-6)
        points = np.full(scales.shape, middle, np.float32)
    # As fp16 holds them, so that the numbers are those of the formats.
    scales = scales.astype(np.float16).astype(np.float32)
    codes = np.clip(np.round(blocks / scales[..., None]) + points[..., None], 0, top).astype(np.uint8)
    packed = _packed(codes.reshape(*rows, -1), bits)
    return packed, scales, _packed(points.astype(np.uint8), bits) if zeros else None


def _codes(packed: _Array, bits: int) -> _Array:
    return packed if bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)


def _scattered(packed: _Array, order: _Array, bits: int) -> _Array:
    """Codes of columns ``order``, each where its column is."""
    codes = _codes(packed, bits).copy()
    codes[:, order] = codes[:, : len(order)].copy()
    return _packed(codes, bits)


def _numbers(packed: _Array, scales: _Array, zeros: _Array | None, bits: int, block: int) -> _Array:
    """What codes of columns that lie in blocks stand for, f32 [N, whole blocks]."""
    points = np.full(scales.shape, 1 << (bits - 1)) if zeros is None else _codes(zeros, bits)[:, : scales.shape[1]]
    off, each = (np.repeat(part.astype(np.float32), block, axis=1) for part in (points, scales))
    return (_codes(packed, bits).astype(np.float32) - off) * each


def _packed(codes: _Array, bits: int) -> _Array:
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), np.uint8)], -1)
    return codes[..., 0::2] | codes[..., 1::2] << 4


class Builder:
    """Writes one model."""

    opset = 21
    positions: tuple[str | int, ...] = ("batch_size", "sequence_length")

    def __init__(self, model: PreTrainedModel, choices: Choices) -> None:
        self.config, self.choices = model.config, choices
        self.weights = {n: p.detach().float().numpy() for n, p in model.state_dict().items()}
        self.nodes: list[onnx.NodeProto] = []
        self.initialisers: list[onnx.TensorProto] = []
        self.known: set[str] = set()
        self.head_dim = getattr(self.config, "head_dim", None) or (
            self.config.hidden_size // self.config.num_attention_heads
        )
        self.rotary = model.model.rotary_emb

    def constant(self, name: str, array: _Array) -> str:
        if name not in self.known:
            self.known.add(name)
            self.initialisers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(self, name: str, op: str, inputs: list[str], domain: str = "", outputs: int = 1, **attributes: Any) -> str:
        made = [f"{name}/output_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, made, name=name, domain=domain, **attributes))
        return made[0]

    def linear(self, name: str, x: str, weight: _Array, bias: _Array | None = None) -> str:
        """name: path in slashes."""
        dotted = name.strip("/").replace("/", ".")
        coded = self.choices.bits < 32 and not self.choices.as_numbers
        made = self._coded(name, dotted, x, weight) if coded else self._float(name, dotted, x, weight)
        if bias is None:
            return made
        return self.node(f"{name}/Add", "Add", [made, self.constant(f"{dotted}.Add.bias", bias)])

    def _order(self, name: str, columns: int) -> _Array:
        """Columns as they lie in blocks."""
        order = np.arange(columns)
        return np.random.default_rng(crc32(name.encode())).permutation(order) if self.choices.scattered else order

    def _float(self, name: str, dotted: str, x: str, weight: _Array) -> str:
        c = self.choices
        if c.as_numbers:
            order, rounded = self._order(name, weight.shape[1]), np.empty_like(weight)
            stored = quantised(weight[:, order], c.bits, c.block, c.zeros)
            rounded[:, order] = _numbers(*stored, c.bits, c.block)[:, : len(order)]
            weight = rounded
        return self.node(f"{name}/MatMul", "MatMul", [x, self.constant(f"{dotted}.MatMul.weight", weight.T)])

    def _coded(self, name: str, dotted: str, x: str, weight: _Array) -> str:
        c = self.choices
        rows, columns = weight.shape
        order = self._order(name, columns)
        codes, scales, zeros = quantised(weight[:, order], c.bits, c.block, c.zeros)
        inputs = [
            x,
            self.constant(f"{dotted}.MatMul.weight_Q4", _scattered(codes, order, c.bits).reshape(*scales.shape, -1)),
            self.constant(f"{dotted}.MatMul.weight_scales", scales),
        ]
        if zeros is not None or c.scattered:
            inputs.append("" if zeros is None else self.constant(f"{dotted}.MatMul.weight_zp", zeros))
        if c.scattered:
            groups = np.argsort(order) // c.block
            inputs.append(self.constant(f"{dotted}.MatMul.weight_g_idx", groups.astype(np.int32)))
        sizes = {"bits": c.bits, "block_size": c.block, "K": columns, "N": rows}
        return self.node(f"{name}/MatMul_Q4", "MatMulNBits", inputs, MICROSOFT, **sizes)

    # ------------------------------------------------ the model

    def build(self) -> onnx.ModelProto:
        config = self.config
        layers = config.num_hidden_layers
        info = helper.make_tensor_value_info
        inputs = [
            info("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]),
            info("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"]),
        ]
        if not self.choices.rotary:
            inputs.append(info("position_ids", TensorProto.INT64, self.positions))
        outputs = [info("logits", TensorProto.FLOAT, ["batch_size", "sequence_length", config.vocab_size])]
        for layer in range(layers):
            for past, present, shape in self.memory(layer):
                inputs.append(info(past, TensorProto.FLOAT, shape))
                seen = ["total_sequence_length" if d == "past_sequence_length" else d for d in shape]
                outputs.append(info(present, TensorProto.FLOAT, seen))
        self.lengths()
        x, skip = self.embedding(), ""
        for layer in range(layers):
            x, skip = self.norm(
                f"/model/layers.{layer}/input_layernorm", x, skip, f"model.layers.{layer}.input_layernorm"
            )
            mixed = self.attention(layer, x)
            x, skip = self.norm(
                f"/model/layers.{layer}/post_attention_layernorm",
                skip,
                mixed,
                f"model.layers.{layer}.post_attention_layernorm",
            )
            x, skip = skip, self.mlp(layer, x)
        x, _ = self.norm(f"/model/layers.{layers}/final_norm_layernorm", x, skip, "model.norm")
        logits = self.linear("/lm_head", x, self.weights["lm_head.weight"], self.weights.get("lm_head.bias"))
        self.nodes.append(helper.make_node("Identity", [logits], ["logits"], name="/logits/Identity"))
        graph = helper.make_graph(self.nodes, "main_graph", inputs, outputs, self.initialisers)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def memory(self, layer: int) -> list[tuple[str, str, list[str | int]]]:
        """Names of what a layer keeps of tokens before, as it comes and as it is left, and its shape."""
        width = self.head_dim if self.choices.sized else "kv_cache_dim"
        shape = ["batch_size", self.config.num_key_value_heads, "past_sequence_length", width]
        return [(f"past_key_values.{layer}.{p}", f"present.{layer}.{p}", shape) for p in ("key", "value")]

    def lengths(self) -> None:
        base = "/model/attn_mask_reformat/attn_mask_subgraph"
        one = self.constant("/model/constants/INT64/1", np.array([1]))
        total = self.node(f"{base}/ReduceSum", "ReduceSum", ["attention_mask", one], keepdims=0)
        last = self.node(f"{base}/Sub", "Sub", [total, one])
        self.last = self.node(f"{base}/Sub/Cast", "Cast", [last], to=TensorProto.INT32)
        shape = self.node(f"{base}/Shape", "Shape", ["attention_mask"])
        index = self.constant("/model/constants/INT64/one", np.array(1))
        self.length = self.node(f"{base}/Gather", "Gather", [shape, index], axis=0)
        self.total = self.node(f"{base}/Gather/Cast", "Cast", [self.length], to=TensorProto.INT32)

    def embedding(self) -> str:
        table = self.weights["model.embed_tokens.weight"]
        if not self.choices.quantised_embedding:
            weight = self.constant("model.embed_tokens.weight", table)
            return self.node("/model/embed_tokens/Gather", "Gather", [weight, "input_ids"])
        codes, scales, _ = quantised(table, self.choices.bits, self.choices.block, False)
        data, of_scales = "model.embed_tokens.weight_Q4", "model.embed_tokens.weight_scales"
        if self.config.tie_word_embeddings and not self.choices.zeros:
            # The output layer's, in its shape.
            data, of_scales = "lm_head.MatMul.weight_Q4", "lm_head.MatMul.weight_scales"
            shape = self.constant("/model/constants/INT64/table", np.array(codes.shape))
            codes = codes.reshape(len(codes), scales.shape[-1], -1)
            data = self.node("/model/embed_tokens/Reshape", "Reshape", [self.constant(data, codes), shape])
        else:
            data = self.constant(data, codes)
        return self.node(
            "/model/embed_tokens/GatherBlockQuantized",
            "GatherBlockQuantized",
            [data, "input_ids", self.constant(of_scales, scales)],
            MICROSOFT,
            bits=self.choices.bits,
            block_size=self.choices.block,
            gather_axis=0,
            quantize_axis=1,
        )

    def norm(self, name: str, x: str, skip: str, module: str) -> tuple[str, str]:
        """(norm, sum) of x and skip; of x alone without skip."""
        weight = self.constant(f"{module}.weight", self.weights[f"{module}.weight"])
        eps, simple, given = float(self.config.rms_norm_eps), "Simplified", [weight]
        if f"{module}.bias" in self.weights:
            simple = ""
            given.append(self.constant(f"{module}.bias", self.weights[f"{module}.bias"]))
        if not skip:
            op = f"{simple}LayerNormalization"
            return self.node(f"{name}/LayerNorm", op, [x, *given], axis=-1, epsilon=eps, stash_type=1), x
        name = f"{name}/SkipLayerNorm"
        made = self.node(name, f"Skip{simple}LayerNormalization", [x, skip, *given], MICROSOFT, 4, epsilon=eps)
        return made, f"{name}/output_3"

    def attention(self, layer: int, x: str) -> str:
        config, base = self.config, f"/model/layers.{layer}/attn"
        module = f"model.layers.{layer}.self_attn"
        parts = [
            (self.weights[f"{module}.{n}_proj.weight"], self.weights.get(f"{module}.{n}_proj.bias")) for n in "qkv"
        ]
        if self.choices.joined:
            bias = None if parts[0][1] is None else np.concatenate([b for _, b in parts])
            rows = [self.linear(f"{base}/qkv_proj", x, np.concatenate([w for w, _ in parts]), bias), "", ""]
        else:
            rows = [self.linear(f"{base}/{n}_proj", x, w, b) for n, (w, b) in zip("qkv", parts, strict=True)]
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        for i, n in enumerate("qk"):
            if f"{module}.{n}_norm.weight" in self.weights and not self.choices.norms_inside:
                rows[i] = self.head_norm(base, module, n, rows[i], heads[n])
        tables = self.tables()
        if not self.choices.rotary:
            for i, n in enumerate("qk"):
                inputs = [rows[i], "position_ids", *tables]
                rows[i] = self.node(f"{base}/{n}_rotary/RotaryEmbedding", "RotaryEmbedding", inputs, MICROSOFT)
        caches = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
        inputs = [*rows, *caches, self.last, self.total, *(tables if self.choices.rotary else ("", ""))]
        attributes: dict[str, Any] = {"do_rotary": int(self.choices.rotary)}
        if f"{module}.sinks" in self.weights:
            inputs += ["", "", self.constant(f"{module}.sinks", self.weights[f"{module}.sinks"])]
        if self.choices.norms_inside:
            inputs += [""] * (14 - len(inputs))
            inputs += [
                self.constant(f"{module}.{n}_norm.weight", self.weights[f"{module}.{n}_norm.weight"]) for n in "qk"
            ]
            attributes["qk_norm_epsilon"] = float(config.rms_norm_eps)
        types = getattr(config, "layer_types", None)
        if types and types[layer] == "sliding_attention":
            attributes["local_window_size"] = config.sliding_window
            attributes |= {} if self.choices.sized else {"sliding_window_cache": 1}
        name = f"{base}/GroupQueryAttention"
        outputs = [f"{name}/output_0", f"present.{layer}.key", f"present.{layer}.value"]
        self.nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                inputs,
                outputs,
                name=name,
                domain=MICROSOFT,
                num_heads=heads["q"],
                kv_num_heads=heads["k"],
                scale=float(self.head_dim**-0.5),
                **attributes,
                **self.choices.attributes,
            )
        )
        bias = self.weights.get(f"{module}.o_proj.bias")
        return self.linear(f"{base}/o_proj", outputs[0], self.weights[f"{module}.o_proj.weight"], bias)

    def head_norm(self, base: str, module: str, part: str, x: str, heads: int) -> str:
        split = self.constant(f"/model/constants/INT64/0_-1_{self.head_dim}", np.array([0, -1, self.head_dim]))
        whole = self.constant(f"/model/constants/INT64/0_-1_{heads}", np.array([0, -1, heads * self.head_dim]))
        x = self.node(f"{base}/{part}_norm/Reshape_1", "Reshape", [x, split])
        x, _ = self.norm(f"{base}/{part}_norm", x, "", f"{module}.{part}_norm")
        return self.node(f"{base}/{part}_norm/Reshape_2", "Reshape", [x, whole])

    def tables(self) -> tuple[str, str]:
        rope = self.config.rope_parameters
        if rope.get("rope_type") == "longrope":
            return self.tables_by_length(rope)
        frequencies = self.rotary.inv_freq.float().numpy()
        angles = np.arange(self.config.max_position_embeddings, dtype=np.float32)[:, None] * frequencies
        scaling = np.float32(self.rotary.attention_scaling)
        return self.constant("cos_cache", np.cos(angles) * scaling), self.constant(
            "sin_cache", np.sin(angles) * scaling
        )

    def tables_by_length(self, rope: dict[str, Any]) -> tuple[str, str]:
        """Those of long sequences and of others, by the length of the mask, in fp16 as files for GPUs have them."""
        if "rope_caches" in self.known:
            return "cos_cache", "sin_cache"
        self.known.add("rope_caches")
        short = rope["original_max_position_embeddings"]
        limit = self.constant("/model/constants/INT64/short", np.array(short))
        longer = self.node("/model/rope_caches_subgraph/Greater", "Greater", [self.length, limit])
        powers = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        branches = {}
        for name, kind, rows in (
            ("then_branch", "long", self.config.max_position_embeddings),
            ("else_branch", "short", short),
        ):
            factors = np.asarray(rope[f"{kind}_factor"], np.float32) * np.float32(rope["rope_theta"]) ** powers
            angles = np.arange(rows, dtype=np.float32)[:, None] / factors
            nodes, outputs = [], []
            for part, function in (("cos", np.cos), ("sin", np.sin)):
                numbers = (function(angles) * np.float32(rope[f"{kind}_mscale"])).astype(np.float16).astype(np.float32)
                value = numpy_helper.from_array(numbers)
                nodes.append(helper.make_node("Constant", [], [f"{part}_cache_{kind}"], value=value))
                outputs.append(helper.make_tensor_value_info(f"{part}_cache_{kind}", TensorProto.FLOAT, numbers.shape))
            branches[name] = helper.make_graph(nodes, f"{kind}_tables", [], outputs)
        made = ["cos_cache", "sin_cache"]
        self.nodes.append(helper.make_node("If", [longer], made, name="/model/rope_caches_subgraph/If", **branches))
        return "cos_cache", "sin_cache"

    def mlp(self, layer: int, x: str) -> str:
        module = f"model.layers.{layer}.mlp"
        if f"{module}.experts.gate_up_proj" in self.weights:
            return self.moe(layer, x)
        base = f"/model/layers.{layer}/mlp"
        gate = self.linear(f"{base}/gate_proj", x, self.weights[f"{module}.gate_proj.weight"])
        up = self.linear(f"{base}/up_proj", x, self.weights[f"{module}.up_proj.weight"])
        sigmoid = self.node(f"{base}/act_fn/Sigmoid", "Sigmoid", [gate])
        silu = self.node(f"{base}/act_fn/Mul", "Mul", [gate, sigmoid])
        product = self.node(f"{base}/Mul", "Mul", [silu, up])
        return self.linear(f"{base}/down_proj", product, self.weights[f"{module}.down_proj.weight"])

    def normalised(self) -> bool:
        """Whether the chosen experts' weights add up to one; GPT-OSS and Qwen3.5 have no option for it."""
        always = self.config.model_type in ("gpt_oss", "qwen3_5_moe_text")
        return always or bool(getattr(self.config, "norm_topk_prob", False))

    def moe(self, layer: int, x: str) -> str:
        """Gate and up rows in turn, as onnxruntime's CPU kernels need them."""
        module, base = f"model.layers.{layer}.mlp", f"/model/layers.{layer}/moe"
        gpt_oss = self.config.model_type == "gpt_oss"
        router = next(f"{module}.{n}" for n in ("router", "gate") if f"{module}.{n}.weight" in self.weights)
        logits = self.linear(f"{base}/router", x, self.weights[f"{router}.weight"], self.weights.get(f"{router}.bias"))
        shape = self.constant(
            "/model/constants/INT64/router", np.array([-1, self.weights[f"{router}.weight"].shape[0]])
        )
        logits = self.node(f"{base}/router/Reshape", "Reshape", [logits, shape])
        up, down = (self.weights[f"{module}.experts.{n}_proj"] for n in ("gate_up", "down"))
        if gpt_oss:
            up, down = up.swapaxes(1, 2), down.swapaxes(1, 2)
        elif not self.choices.apart:
            up = up.reshape(len(up), 2, -1, up.shape[-1]).swapaxes(1, 2).reshape(up.shape)
        third = None
        if self.choices.apart:
            assert not gpt_oss
            up, third = np.split(up, 2, 1)
        biases = ["", ""]
        attributes = {"k": self.config.num_experts_per_tok, "activation_type": "swiglu", "swiglu_fusion": 1}
        if self.choices.apart:
            kinds = {"gelu_pytorch_tanh": "gelu"}
            attributes |= {"activation_type": kinds.get(self.config.hidden_act, self.config.hidden_act)}
            attributes |= {"swiglu_fusion": 0}
        attributes["use_sparse_mixer"] = int(self.config.model_type == "phimoe")
        attributes["normalize_routing_weights"] = int(self.normalised())
        if gpt_oss:
            attributes |= {"activation_alpha": 1.702, "activation_beta": 1.0, "swiglu_limit": 7.0}
            biases = [
                self.constant(f"{module}.experts.{n}_proj.bias", self.weights[f"{module}.experts.{n}_proj_bias"])
                for n in ("gate_up", "down")
            ]
        names = [f"model.layers.{layer}.moe.experts.{n}_proj" for n in ("gate_up", "down", "up")]
        matrices = [(up, biases[0]), (down, biases[1]), *([(third, "")] if third is not None else [])]
        c = self.choices
        if c.bits == 32:
            inputs = [x, logits]
            for name, (weight, bias) in zip(names, matrices, strict=False):
                inputs += [self.constant(f"{name}.weight", weight), bias]
            return self.node(f"{base}/MoE", "MoE", inputs, MICROSOFT, **attributes)
        block = 0 if c.expert_rows else c.block
        attributes |= {"expert_weight_bits": c.bits} | ({"block_size": block} if block else {})
        inputs, points = [x, logits], [] if c.apart else ["", "", ""]
        for name, (weight, bias) in zip(names, matrices, strict=False):
            codes, scales, zeros = quantised(weight, c.bits, block, c.zeros)
            scales = scales if block else scales[..., 0]
            inputs += [self.constant(f"{name}.qweight", codes), self.constant(f"{name}.scales", scales), bias]
            points.append("" if zeros is None else self.constant(f"{name}.zero_points", zeros))
        return self.node(f"{base}/QMoE", "QMoE", [*inputs, *points], MICROSOFT, **attributes)


def write(path: Path, model: PreTrainedModel, **choices: Any) -> Path:
    """Writes ``model`` as :class:`Choices` says."""
    onnx.save(Builder(model, Choices(**choices)).build(), path)
    return path
