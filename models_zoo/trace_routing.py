"""Records the routing traces that come with demo-moe: ``python -m hetcomp.models_zoo.trace_routing [--tokens 2048]``.

One file for each text of ``eval``, in ``demo-moe/routing``: the first tokens of the text, read in float32 in windows of
1,024 positions, by the runtime on the CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import hetcomp
from hetcomp.models_zoo import evaluation_texts, find
from hetcomp.plan_wishes import PlanWishes
from hetcomp.record_routing import record_text

_WINDOW = 1024


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048, help="of each text")
    parser.add_argument("--out", type=Path, default=find("demo-moe") / "routing")
    o = parser.parse_args()
    o.out.mkdir(parents=True, exist_ok=True)
    exe = hetcomp.compile("demo-moe", formats="f32", context_length=_WINDOW, wishes=PlanWishes(vram=0))
    for text in evaluation_texts():
        ids = exe.runtime.tokenize(text.read_text(encoding="utf-8"))[: o.tokens]
        trace = record_text(exe, ids, text.name)
        trace.write(o.out / f"{text.stem}.safetensors")
        print(f"{text.stem}: {trace.tokens} tokens")


if __name__ == "__main__":
    main()
