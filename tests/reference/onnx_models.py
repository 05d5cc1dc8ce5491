"""ONNX graphs of tiny models, as torch's exporter and onnxruntime-genai's builder write them, and their logits."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from transformers import DynamicCache, PreTrainedModel

from hetcomp.frontend import Imported
from hetcomp.frontend.checkpoint import BaseCheckpoint
from hetcomp.ir.plan import Value
from hetcomp.quantised_numbers import QuantisedNumbers
from tests.reference.plan_interpreter import PlanInterpreter

_AUTO = torch.export.Dim.AUTO
Floats = npt.NDArray[np.float32]


class _Step(torch.nn.Module):
    """A decoder with its caches as inputs and outputs, as optimum exports it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model.model
        self.lm_head = model.lm_head

    def forward(self, input_ids, attention_mask, position_ids, *past: torch.Tensor):
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache
        )
        kept = [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)] if past else []
        return (self.lm_head(out.last_hidden_state), *kept)


def export(path: Path, model: PreTrainedModel, attention: str = "eager", caches: bool = True, opset: int = 17) -> Path:
    """Writes ``model`` as torch.onnx.export does, with inputs input_ids, attention_mask, position_ids and, with caches,
    past_key_values.*; from opset 18 on by torch.export."""
    config = model.config
    config._attn_implementation = attention
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = range(config.num_hidden_layers if caches else 0)
    past = [torch.randn(1, config.num_key_value_heads, 5, head_dim) for _ in layers for _ in "kv"]
    names = [f"{i}.{part}" for i in layers for part in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{n}" for n in names)]
    axes = {"input_ids": {1: "sequence"}, "attention_mask": {1: "total"}, "position_ids": {1: "sequence"}}
    axes |= {name: {2: "past"} for name in inputs[3:]}
    dynamic = ({1: _AUTO}, {1: _AUTO}, {1: _AUTO}, tuple({2: _AUTO} for _ in past))
    ids = torch.arange(3)[None]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Step(model).eval(),
            (ids, torch.ones(1, 8 if caches else 3, dtype=torch.int64), ids + (5 if caches else 0), *past),
            path,
            input_names=inputs,
            output_names=["logits", *(f"present.{n}" for n in names)],
            opset_version=opset,
            verbose=False,
            **({"dynamic_axes": axes, "dynamo": False} if opset < 18 else {"dynamic_shapes": dynamic, "dynamo": True}),
        )
    return path


def reference_logits(path: Path, ids: list[int], split: int, head_dim: int = 0, as_written: bool = False) -> Floats:
    """onnxruntime's logits [len(ids), vocab], in two steps, the second from the caches and states that the first left.
    head_dim: of the caches, where the file has only a name for it. as_written: nothing is fused; a product with what is
    dequantised would else round activations to 8 bits."""
    options = onnxruntime.SessionOptions()
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    given = {i.name: i.shape for i in session.get_inputs()}
    past = {
        name: np.zeros((1, shape[1], 0, head_dim or shape[3]), np.float32)
        for name, shape in given.items()
        if name.startswith("past_key_values")
    }
    past |= {name: np.zeros((1, *shape[1:]), np.float32) for name, shape in given.items() if name.startswith("past.")}
    seen, rows = 0, []
    for part in (part for part in (ids[:split], ids[split:]) if part):
        total = seen + len(part)
        known = {
            "input_ids": np.array([part]),
            "position_ids": np.broadcast_to(
                np.arange(seen, total), (*given.get("position_ids", [1])[:-2], 1, total - seen)
            ),
            "attention_mask": np.ones((1, total), np.int64),
        }
        made = session.run(None, {k: v for k, v in known.items() if k in given} | past)
        rows.append(made[0][0])
        left = dict(zip(names[1:], made[1:], strict=True))
        past = {v: left[v.replace("past_key_values", "present").replace("past.", "present.")] for v in past}
        seen = total
    return np.concatenate(rows)


class _Dequantised:
    """A checkpoint's weights as numbers."""

    def __init__(self, checkpoint: BaseCheckpoint) -> None:
        self._checkpoint = checkpoint

    def read(self, value: Value) -> npt.NDArray[Any]:
        made = self._checkpoint.read(value)
        return made.to_f32() if isinstance(made, QuantisedNumbers) else made


def interpreted_logits(imported: Imported, ids: list[int], split: int) -> Floats:
    """What the Plan gives for a prompt of ``split`` tokens and then one token after the other."""
    assert imported.checkpoint is not None
    run = PlanInterpreter(imported.plan, _Dequantised(imported.checkpoint))
    rows = [run.step(ids[:split], range(split))]
    rows += [run.step([ids[at]], [at]) for at in range(split, len(ids))]
    return torch.cat(rows).numpy()


def relative_error(got: Floats, want: Floats) -> float:
    """Largest difference over the largest value."""
    return float(np.abs(got - want).max() / np.abs(want).max())
