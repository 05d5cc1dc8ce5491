"""What deferring experts does to demo-moe's output on real text, and what skipping the same experts does instead.

python -m benchmarks.deferral_quality [--choices 1,2,3] [--tokens 2048]

The model runs in float32 in transformers with the definition of docs/decisions/expert-deferral.md; all experts count as
the CPU's, every token as a generated one, the last MoE layer defers nothing. Windows of 512 tokens are read of each
text of models_zoo/eval. KL divergences are of the model's own distribution from the changed one, in nats a token.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers

import hetcomp
from benchmarks.cpu_e2e import show
from benchmarks.record import Record
from hetcomp.deferral_on_text import compare
from hetcomp.frontend.source import resolve
from hetcomp.ir.annotations import DeferralQuality
from hetcomp.ir.deferral import LayerChoices
from hetcomp.models_zoo import evaluation_texts
from hetcomp.progress import QuietProgress
from hetcomp.text_windows import spread_windows, token_ids

MODEL = "demo-moe"
WAYS = {"deferred": False, "skipped": True}


def layers_of(deferred: int, layers: int, experts: int) -> list[LayerChoices]:
    """What every MoE layer defers."""
    on_cpu = (True,) * experts
    return [LayerChoices(deferred if layer + 1 < layers else 0, on_cpu) for layer in range(layers)]


def add(record: Record, name: str, windows: Sequence[DeferralQuality]) -> None:
    """The means over windows of equal length, and the standard error of the KL by windows: tokens of one are not
    independent."""
    kl = np.array([quality.kl for quality in windows])
    after, before = (
        float(np.exp(np.mean([np.log(getattr(q, of)) for q in windows])))
        for of in ("perplexity", "undeferred_perplexity")
    )
    record.add(f"{name}: KL", "nats", float(kl.mean()), higher_is_better=False)
    record.add(f"{name}: perplexity", "", after, higher_is_better=False)
    record.derived[f"{name}: perplexity against the model's own, %"] = 100 * (after / before - 1)
    if len(kl) > 1:
        record.derived[f"{name}: standard error of KL"] = float(kl.std(ddof=1) / len(kl) ** 0.5)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choices", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 3])
    parser.add_argument("--tokens", type=int, default=2048, help="of each text")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    source = resolve(MODEL)
    network = source.model_class.from_pretrained(
        source.folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    config = source.config
    sizes = (int(config.num_hidden_layers), int(config.num_experts))
    candidates = [layers_of(n, *sizes) for n in options.choices]
    record = Record("deferral_quality", {"model": MODEL, "top_k": config.num_experts_per_tok, "tokens": options.tokens})
    record.versions = {"transformers": transformers.__version__, "hetcomp": hetcomp.__version__}
    found: dict[str, list[DeferralQuality]] = {}
    for text in evaluation_texts():
        for window in spread_windows([token_ids(source, text)], options.tokens):
            for way, skip in WAYS.items():
                results = compare(network, [window], candidates, text.stem, QuietProgress(), skip=skip)
                for choices, quality in zip(options.choices, results, strict=True):
                    for domain in (text.stem, "all texts"):
                        found.setdefault(f"{domain}, {choices} {way}", []).append(quality)
        print(f"read {text.stem}", flush=True)
    for name, windows in found.items():
        add(record, name, windows)
    show(record)
    print(record.write(options.out) if options.out else record.write())


if __name__ == "__main__":
    main()
