"""Accuracy of a weight format on real text: perplexity and KL divergence of demo-moe.

python -m benchmarks.perplexity [--formats bf16] [--windows 8]

Each text of models_zoo/eval is cut into windows; every engine predicts each window's tokens from those
before them. The KL divergence is the mean over all positions of KL(f32 || format) and of KL(format || f32),
in nats.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer

import hetcomp
from benchmarks import models
from benchmarks.cpu_e2e import show
from benchmarks.record import Record
from hetcomp.models_zoo import evaluation_texts, find

Logits = Callable[[list[int]], NDArray[np.float32]]


@dataclass
class Accuracy:
    """Perplexity on the windows, and against the reference: mean KL divergences and share of equal top
    tokens.
    """

    perplexity: float
    kl_from_reference: float
    kl_to_reference: float
    top1_agreement: float


def windows(tokenizer: Tokenizer, length: int, per_text: int) -> Iterator[list[int]]:
    """Windows of ``length`` tokens, ``per_text`` of each evaluation text, evenly spread over it."""
    for text in evaluation_texts():
        ids = tokenizer.encode(text.read_text()).ids
        starts = np.linspace(0, len(ids) - length, per_text).astype(int)
        yield from (ids[start : start + length] for start in starts)


def evaluate(engines: Mapping[str, Logits], reference: str, texts: list[list[int]]) -> dict[str, Accuracy]:
    """Accuracy of every engine on ``texts``, with ``engines[reference]`` as the reference distribution."""
    loss = dict.fromkeys(engines, 0.0)
    forward, backward, equal = (dict.fromkeys(engines, 0.0) for _ in range(3))
    positions = 0
    for ids in texts:
        log_p = {name: _log_softmax(engine(ids)[:-1]) for name, engine in engines.items()}
        base = log_p[reference]
        targets = np.array(ids[1:])
        positions += len(targets)
        for name, log_q in log_p.items():
            loss[name] -= float(log_q[np.arange(len(targets)), targets].sum())
            forward[name] += float((np.exp(base) * (base - log_q)).sum())
            backward[name] += float((np.exp(log_q) * (log_q - base)).sum())
            equal[name] += float((base.argmax(-1) == log_q.argmax(-1)).sum())
    return {
        name: Accuracy(
            float(np.exp(loss[name] / positions)),
            forward[name] / positions,
            backward[name] / positions,
            equal[name] / positions,
        )
        for name in engines
    }


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def transformers_logits(folder: Path) -> Logits:
    """The reference: transformers in float32, eager experts and attention."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()

    @torch.inference_mode()
    def logits(ids: list[int]) -> NDArray[np.float32]:
        result: NDArray[np.float32] = model(torch.tensor([ids])).logits[0].numpy()
        return result

    return logits


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", default="bf16", help="formats to judge, comma-separated")
    parser.add_argument("--windows", type=int, default=8, help="windows per text")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    options = parser.parse_args()
    folder = find("demo-moe")
    engines: dict[str, Logits] = {"transformers f32": transformers_logits(folder)}
    record = Record("perplexity", {"model": "demo-moe", "windows": options.windows, "length": options.length})
    for formats in ["f32", *options.formats.split(",")]:
        target = models.FOLDER / f"demo-moe-{formats}.hetc"
        engines[f"hetcomp {formats}"] = hetcomp.compile(
            folder, context_length=options.length, formats=formats, out=target
        )
        record.plan_sha256 = models.plan_sha256(target)
    texts = list(windows(Tokenizer.from_file(str(folder / "tokenizer.json")), options.length, options.windows))
    record.versions = {"transformers": transformers.__version__, "hetcomp": hetcomp.__version__}
    results = evaluate(engines, "hetcomp f32", texts)
    for name, accuracy in results.items():
        record.add(f"{name} perplexity", "", accuracy.perplexity, higher_is_better=False)
        record.derived[f"{name}: perplexity against f32, %"] = 100 * (
            accuracy.perplexity / results["hetcomp f32"].perplexity - 1
        )
        record.derived[f"{name}: KL(f32 || it)"] = accuracy.kl_from_reference
        record.derived[f"{name}: KL(it || f32)"] = accuracy.kl_to_reference
        record.derived[f"{name}: same top token, %"] = 100 * accuracy.top1_agreement
    show(record)
    print(record.write())


if __name__ == "__main__":
    main()
