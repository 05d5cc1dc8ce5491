"""Published decode speeds of hybrid systems beside what hetcomp-plan says the same hardware could do.

python -m benchmarks.published_figures

An outside check of the cost model: a plan that predicts less than what somebody has measured is wrong. The hardware
is a preset (data-sheet figures) as near to the published one as there is; ``note`` says where it differs. The model is
planned in a format of about as many bits as theirs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.record import Record, Series
from hetcomp.compiler import plan_model
from hetcomp.ir.annotations import Mix
from hetcomp.plan_wishes import PlanWishes


@dataclass(frozen=True)
class Published:
    """A figure from somebody's documentation: decode tokens/s of one stream."""

    system: str
    model: str
    preset: str
    formats: str
    prompt: int
    decode: float
    source: str
    note: str = ""


FIGURES = (
    Published(
        "KTransformers v0.2, Q4_K_M", "deepseek-v3", "rtx4090+2x6454s-1tb", "q4", 512, 12.2,
        "KTransformers DeepseekR1_V3_tutorial.md", "theirs is a 4090D (fewer cores, the same memory)",
    ),
    Published(
        "KTransformers v0.2, Q4_K_M, one socket", "deepseek-v3", "rtx4090+6454s-512gb", "q4", 512, 8.73,
        "KTransformers DeepseekR1_V3_tutorial.md", "theirs is a 4090D",
    ),
    Published(
        "llama.cpp, Q4_K_M", "deepseek-v3", "rtx4090+2x6454s-1tb", "q4", 512, 4.51,
        "KTransformers DeepseekR1_V3_tutorial.md", "as they measured their peer",
    ),
    Published(
        "KTransformers, FP8", "minimax-m2", "rtx5090+2x9355-1152gb", "fp8", 2048, 32.1,
        "KTransformers MiniMax-M2.1-Tutorial.md", "M2.1 has M2's shape",
    ),
    Published(
        "KTransformers, Q4_K_M", "kimi-k2", "rtx4090+2x8480-1tb", "q4", 512, 14.0,
        "KTransformers Kimi-K2.md", "CPU and GPU are not named there",
    ),
    Published(
        "KTransformers, int8", "glm-4.5-air", "rtx4090+2x6454s-1tb", "q8", 512, 16.0,
        "KTransformers SmallThinker_and_Glm4moe.md", "two sockets and a GPU, not named",
    ),
    Published(
        "KTransformers AVX2, bf16, 28 experts on the GPU", "qwen3-30b-a3b", "rtx5090+9355-384gb", "bf16", 512, 52.0,
        "KTransformers issue 1914", "theirs ran 16 threads",
    ),
)  # fmt: skip


def main() -> None:
    """Plans every pair, prints and records the comparison; fails if a published figure lies above a plan."""
    rows: list[dict[str, Any]] = []
    table = Table(title="Published decode beside the plan's", title_justify="left")
    for name in ("system", "model", "hardware"):
        table.add_column(name)
    for name in ("published tok/s", "planned tok/s", "left unused"):
        table.add_column(name, justify="right")
    for figure in FIGURES:
        wishes = PlanWishes(mix=Mix(figure.prompt, 256))
        machine = f"preset:{figure.preset}"
        # What the hardware could do, code for it or not.
        planned = plan_model(figure.model, hw_profile=machine, formats=figure.formats, wishes=wishes, planning=True)
        decode = next(t for t in planned.plan.timelines if t.phase == "decode")
        gap = planned.plan.solution.gap if planned.plan.solution else None
        unused = 1.0 - figure.decode / decode.tokens_per_s
        rows.append(
            {
                **asdict(figure),
                "planned": decode.tokens_per_s,
                "unused": unused,
                "gap": gap,
                "place_seconds": planned.seconds["place"],
            }
        )
        table.add_row(
            figure.system,
            figure.model,
            figure.preset,
            f"{figure.decode:g}",
            f"{decode.tokens_per_s:.1f}",
            f"{unused:.0%}",
        )
    Console(width=150).print(table)
    record = Record("published_figures", {"pairs": rows})
    record.series = [
        Series("published decode", "tokens/s", [f.decode for f in FIGURES]),
        Series("planned decode", "tokens/s", [row["planned"] for row in rows]),
    ]
    record.write()
    above = [row["system"] for row in rows if row["unused"] < 0]
    if above:
        raise SystemExit(f"published above the plan's ceiling: {', '.join(above)}")


if __name__ == "__main__":
    main()
