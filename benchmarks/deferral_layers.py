"""What deferring costs in each MoE layer of demo-moe alone, and whether the costs of several layers add up.

python -m benchmarks.deferral_layers [--choices 1,2,3] [--mixes 8] [--tokens 2048]

The model runs in float32 in transformers with the definition of docs/decisions/expert-deferral.md, on windows of the
texts of models_zoo/eval; all experts count as the CPU's, every token as a generated one. Mixes are drawn: in every
layer but the last 0 to 2 choices. KL divergences are of the model's own distribution from the changed one, in nats a
token.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
import transformers
from rich.console import Console

import hetcomp
from benchmarks.cpu_e2e import show
from benchmarks.deferral_quality import MODEL
from benchmarks.record import Record
from hetcomp.cli.progress import RichProgress
from hetcomp.deferral_on_text import compare
from hetcomp.frontend.source import resolve
from hetcomp.ir.deferral import LayerChoices
from hetcomp.models_zoo import evaluation_texts
from hetcomp.text_windows import spread_windows, token_ids

Counts = tuple[int, ...]


def alone(choices: int, layer: int, layers: int) -> Counts:
    """That layer defers, no other."""
    return tuple(choices if number == layer else 0 for number in range(layers))


def candidates(choices: Sequence[int], layers: int, mixes: int) -> list[Counts]:
    """Each layer but the last with each number of choices, all of them together, and mixes."""
    found = [alone(n, layer, layers) for n in choices for layer in range(layers - 1)]
    found += [(*(n,) * (layers - 1), 0) for n in choices]
    drawn = np.random.default_rng(1).integers(0, 3, size=(mixes, layers - 1)).tolist()
    return found + [(*row, 0) for row in drawn if sum(map(bool, row)) > 1]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choices", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 3])
    parser.add_argument("--mixes", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048, help="of all texts")
    o = parser.parse_args()
    source = resolve(MODEL)
    layers, on_cpu = int(source.config.num_hidden_layers), (True,) * int(source.config.num_experts)
    network = source.model_class.from_pretrained(
        source.folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    record = Record("deferral_layers", {"model": MODEL, "top_k": source.config.num_experts_per_tok} | vars(o))
    record.versions = {"transformers": transformers.__version__, "hetcomp": hetcomp.__version__}
    windows = spread_windows([token_ids(source, text) for text in evaluation_texts()], o.tokens)
    wanted = candidates(o.choices, layers, o.mixes)
    with RichProgress(Console(stderr=True)) as progress:
        progress.stage("measure deferral", total=sum(map(len, windows)) * (1 + len(wanted)))
        changed = [[LayerChoices(n, on_cpu) for n in counts] for counts in wanted]
        kl = dict(zip(wanted, (q.kl for q in compare(network, windows, changed, "", progress)), strict=True))
    for counts, found in kl.items():
        name = " ".join(map(str, counts))
        record.add(f"deferred by layer {name}: KL", "nats", found, higher_is_better=False)
        parts = [kl[one] for layer, n in enumerate(counts) if n and (one := alone(n, layer, layers)) in kl]
        if len(parts) == sum(map(bool, counts)) > 1:
            record.derived[f"deferred by layer {name}: KL, part of its layers' alone"] = found / sum(parts)
    show(record)
    print(record.write())


if __name__ == "__main__":
    main()
