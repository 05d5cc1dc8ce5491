"""Whether the deferral that a plan chooses itself keeps its accuracy budget on the texts of every domain.

python -m benchmarks.deferral_budget [--budgets 0.01,0.03,0.1] [--tokens 4096] [--profile preset:rtx4090+14900k-64gb]

Of demo-moe with its experts on the CPU beside a GPU, each plan of ``deferral="auto"`` with a budget says how many
choices each layer defers and what that costs on the tokens that the plan itself measures. That choice is measured here
on ``--tokens`` tokens of each text of models_zoo/eval, as deferral_quality.py measures numbers that are given. The
profile is assumed: from it the plan has how many choices would make a step faster. KL divergences in nats a token.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import torch
import transformers

import hetcomp
from benchmarks.cpu_e2e import show
from benchmarks.deferral_quality import MODEL, add
from benchmarks.record import Record
from hetcomp.compiler import plan_model
from hetcomp.deferral_on_text import compare
from hetcomp.frontend.source import ModelSource, resolve
from hetcomp.ir.annotations import DeferralQuality
from hetcomp.ir.deferral import LayerChoices, moe_layers
from hetcomp.models_zoo import evaluation_texts
from hetcomp.plan_wishes import PlanWishes
from hetcomp.progress import QuietProgress
from hetcomp.text_windows import spread_windows, token_ids

PINS = ("*=gpu:0", "moe.experts=cpu")


def choose(record: Record, profile: str, budget: float) -> list[LayerChoices]:
    """What every MoE layer of the plan with that budget defers; beside it what the plan says that this costs."""
    wishes = PlanWishes(pins=PINS, deferral="auto", max_kl=budget)
    plan = plan_model(MODEL, hw_profile=profile, wishes=wishes).plan
    layers = [LayerChoices(layer.placement.deferred, layer.on_cpu) for layer in moe_layers(plan)]
    for number, layer in enumerate(layers):
        record.derived[f"budget {budget:g}: deferred in MoE layer {number}"] = layer.deferred
    if plan.deferral is not None:
        record.derived[f"budget {budget:g}: KL in the plan"] = plan.deferral.kl
        record.derived[f"budget {budget:g}: perplexity in the plan"] = plan.deferral.perplexity
        record.derived[f"budget {budget:g}: perplexity in the plan, undeferred"] = plan.deferral.undeferred_perplexity
        record.derived[f"budget {budget:g}: tokens the plan measured on"] = plan.deferral.tokens
    print(f"budget {budget:g}: {next(note for note in plan.notes if note.startswith('deferral'))}", flush=True)
    return layers


def measure(
    source: ModelSource, chosen: dict[float, list[LayerChoices]], tokens: int
) -> dict[str, list[DeferralQuality]]:
    """By budget and domain, and by budget over all, what was found of each window."""
    network = source.model_class.from_pretrained(
        source.folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    found: dict[str, list[DeferralQuality]] = defaultdict(list)
    for text in evaluation_texts():
        for window in spread_windows([token_ids(source, text)], tokens):
            results = compare(network, [window], [*chosen.values()], text.stem, QuietProgress())
            for budget, quality in zip(chosen, results, strict=True):
                for domain in (text.stem, "all texts"):
                    found[f"budget {budget:g}, {domain}"].append(quality)
        print(f"read {text.stem}", flush=True)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--budgets", type=lambda text: [float(n) for n in text.split(",")], default=[0.01, 0.03, 0.1], help="in nats"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="of each text")
    parser.add_argument("--profile", default="preset:rtx4090+14900k-64gb")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    source = resolve(MODEL)
    conditions = {"model": MODEL, "top_k": source.config.num_experts_per_tok, "profile": options.profile}
    record = Record("deferral_budget", conditions | {"pins": PINS, "tokens": options.tokens})
    record.versions = {"transformers": transformers.__version__, "hetcomp": hetcomp.__version__}
    chosen = {budget: choose(record, options.profile, budget) for budget in options.budgets}
    for name, windows in measure(source, chosen, options.tokens).items():
        add(record, name, windows)
    show(record)
    print(record.write(options.out) if options.out else record.write())


if __name__ == "__main__":
    main()
