"""Which experts a layer's router names when it is applied a layer early, beside those that it then chooses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from hetcomp.models_zoo import evaluation_texts
from hetcomp.progress import ProgressSink

_WINDOW = 1024  # positions of a context: the text goes on in the next
Experts = NDArray[np.int32]
PLACES = ("behind attention", "layer's output")


@dataclass(frozen=True)
class EarlyRouting:
    """Of N tokens, best first: ``chosen`` [N, layers, k]; ``named`` [N, layers - 1, 2k] by the place in the layer
    before whose hidden states the router of layers 1 .. was applied to (PLACES)."""

    chosen: Experts
    named: dict[str, Experts]


def early_routing(folder: Path, tokens: int, progress: ProgressSink) -> dict[str, EarlyRouting]:
    """By text of models_zoo/eval: its first ``tokens`` tokens, by transformers in float32.

    folder: a checkpoint whose decoder layers are all of Qwen3-MoE's make: ``mlp.gate`` routes what
    ``post_attention_layernorm`` makes of the residual behind attention.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = evaluation_texts()
    progress.stage("route early", total=tokens * len(texts))
    found = {}
    for text in texts:
        ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0, :tokens]
        parts = []
        for window in ids.split(_WINDOW):
            parts.append(_of_window(model, window))
            progress.advance(len(window))
        named = {place: np.concatenate([part.named[place] for part in parts]) for place in PLACES}
        found[text.stem] = EarlyRouting(np.concatenate([part.chosen for part in parts]), named)
    return found


@torch.inference_mode()
def _of_window(model: transformers.PreTrainedModel, ids: Tensor) -> EarlyRouting:
    layers, top_k = list(model.model.layers), int(model.config.num_experts_per_tok)
    states: dict[str, list[Tensor]] = {place: [] for place in PLACES}
    behind_attention, output = states.values()
    hooks = [
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, x: behind_attention.append(x[0]))
        for layer in layers
    ]
    hooks += [layer.register_forward_hook(lambda _, __, y: output.append(y)) for layer in layers]
    model.model(ids[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    chosen = [_best(layer, state, top_k) for layer, state in zip(layers, behind_attention, strict=True)]
    named = {
        place: [_best(layer, state, 2 * top_k) for layer, state in zip(layers[1:], before[:-1], strict=True)]
        for place, before in states.items()
    }
    return EarlyRouting(_by_token(chosen), {place: _by_token(some) for place, some in named.items()})


def _best(layer: nn.Module, state: Tensor, count: int) -> Tensor:
    logits: Tensor = layer.mlp.gate(layer.post_attention_layernorm(state))[0]
    return logits.topk(count, dim=-1).indices


def _by_token(layers: list[Tensor]) -> Experts:
    return torch.stack(layers, dim=1).to(torch.int32).numpy()


def recall(chosen: Experts, named: Experts, among: int) -> NDArray[np.float64]:
    """By layer: the part of its choices [N, layers, k] that are among the first ``among`` named [N, layers, n]."""
    hits = (chosen[..., None] == named[:, :, None, :among]).any(axis=-1)
    found: NDArray[np.float64] = hits.mean(axis=(0, 2))
    return found
