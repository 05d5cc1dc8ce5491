"""ONNX graphs of tiny models in the ops of opset 23: Attention, RotaryEmbedding, RMSNormalization."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from transformers import PreTrainedModel

from tests.reference.onnx_genai_models import Builder, Choices


class _Builder(Builder):
    def lengths(self) -> None:
        """A mask [1, 1, T, S] that shows each token the positions up to its own."""
        one, zero = (self.constant(f"/constants/{n}", np.array(n)) for n in (1, 0))
        total = self.node("/mask/Gather", "Gather", [self.node("/mask/Shape", "Shape", ["attention_mask"]), one])
        seen = self.node("/mask/Range", "Range", [zero, total, one])
        axes = self.constant("/constants/axes", np.array([1, 3]))
        own = self.node("/mask/Unsqueeze", "Unsqueeze", ["position_ids", axes])
        self.mask = self.node("/mask/LessOrEqual", "LessOrEqual", [seen, own])
        if self.choices.attributes.get("float_mask"):
            numbers = [self.constant(f"/constants/{n}", np.array(n, np.float32)) for n in (0.0, -3e38)]
            self.mask = self.node("/mask/Where", "Where", [self.mask, *numbers])

    def norm(self, name: str, x: str, skip: str, module: str) -> tuple[str, str]:
        if skip:
            x = self.node(f"{name}_residual/Add", "Add", [x, skip])
        weight = self.constant(f"{module}.weight", self.weights[f"{module}.weight"])
        eps = float(self.config.rms_norm_eps)
        return self.node(f"{name}/RMSNormalization", "RMSNormalization", [x, weight], axis=-1, epsilon=eps), x

    def attention(self, layer: int, x: str) -> str:
        config, base = self.config, f"/model/layers.{layer}/self_attn"
        module = f"model.layers.{layer}.self_attn"
        rows = []
        for part in "qkv":
            heads = config.num_attention_heads if part == "q" else config.num_key_value_heads
            shape = self.constant(f"/constants/heads/{heads}", np.array([0, 0, heads, self.head_dim]))
            row = self.linear(f"{base}/{part}_proj", x, self.weights[f"{module}.{part}_proj.weight"])
            row = self.node(f"{base}/{part}/Reshape", "Reshape", [row, shape])
            if f"{module}.{part}_norm.weight" in self.weights:
                row, _ = self.norm(f"{base}/{part}_norm", row, "", f"{module}.{part}_norm")
            row = self.node(f"{base}/{part}/Transpose", "Transpose", [row], perm=[0, 2, 1, 3])
            if part != "v":
                row = self.node(
                    f"{base}/{part}/RotaryEmbedding", "RotaryEmbedding", [row, *self.tables(), "position_ids"]
                )
            rows.append(row)
        name = f"{base}/Attention"
        inputs = [*rows, self.mask, f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
        outputs = [f"{name}/output_0", f"present.{layer}.key", f"present.{layer}.value"]
        heads = {"q_num_heads": config.num_attention_heads, "kv_num_heads": config.num_key_value_heads}
        self.nodes.append(helper.make_node("Attention", inputs, outputs, name=name))
        whole = self.constant("/constants/whole", np.array([0, 0, heads["q_num_heads"] * self.head_dim]))
        mixed = self.node(f"{base}/Transpose", "Transpose", [outputs[0]], perm=[0, 2, 1, 3])
        mixed = self.node(f"{base}/Reshape", "Reshape", [mixed, whole])
        return self.linear(f"{base}/o_proj", mixed, self.weights[f"{module}.o_proj.weight"])


def write(path: Path, model: PreTrainedModel, float_mask: bool = False) -> Path:
    """float_mask: what is added to scores, in place of which of them count."""
    made = _Builder(model, Choices(rotary=False, attributes={"float_mask": float_mask})).build()
    del made.opset_import[:]
    made.opset_import.append(helper.make_opsetid("", 23))
    made.ir_version = 11
    assert made.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    onnx.save(made, path)
    return path
