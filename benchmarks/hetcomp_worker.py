"""Worker that runs an artifact through hetcomp's Python API: ARTIFACT --threads N [--weights mmap] [--gpus 0,1]
[--adapter FILE]"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import hetcomp
from benchmarks.worker import serve


def main() -> None:
    """Serves decode, prefill, logits, deferral and version."""
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--gpus", type=lambda text: [int(n) for n in text.split(",")], default=())
    parser.add_argument("--adapter", type=Path, help="a packed one, which all calls but decode_batch have")
    options = parser.parse_args()
    exe = hetcomp.load(options.artifact, threads=options.threads, weights=options.weights, gpus=options.gpus)
    adapter = exe.load_adapter(options.adapter) if options.adapter else None

    def decode(prompt: list[int], tokens: int) -> float:
        """Tokens per second after the prompt and the first token."""
        generated = exe.generate(prompt, max_new_tokens=tokens + 1, ignore_eos=True, adapter=adapter)
        stamps = [time.perf_counter() for _ in generated]
        if len(stamps) != tokens + 1:
            raise RuntimeError(f"{len(stamps)} tokens came instead of {tokens + 1}")
        return tokens / (stamps[-1] - stamps[0])

    def decode_batch(prompt: list[int], sequences: int, tokens: int) -> float:
        """Tokens per second of several sequences together, each after the prompt and a token of its own."""
        sessions = [exe.runtime.session() for _ in range(sequences)]
        try:
            for session in sessions:
                session.prefill(prompt)
            ids = list(range(1, sequences + 1))
            exe.runtime.decode(sessions, ids)
            start = time.perf_counter()
            for _ in range(tokens):
                ids = [int(row.argmax()) for row in exe.runtime.decode(sessions, ids)]
            return sequences * tokens / (time.perf_counter() - start)
        finally:
            for session in sessions:
                session.close()

    def prefill(prompt: list[int]) -> float:
        """Prompt tokens per second until the first token is there."""
        start = time.perf_counter()
        for _ in exe.generate(prompt, max_new_tokens=1, ignore_eos=True, adapter=adapter):
            pass
        return len(prompt) / (time.perf_counter() - start)

    def logits(prompt: list[int]) -> list[float]:
        """Logits after the prompt."""
        return [float(x) for x in exe(prompt, adapter=adapter)[-1]]

    serve(
        {
            "decode": decode,
            "decode_batch": decode_batch,
            "prefill": prefill,
            "logits": logits,
            "set_deferral": lambda which: exe.runtime.set_deferral(which),
            "stats": lambda: exe.stats,
            "version": lambda: {"hetcomp": hetcomp.__version__},
        }
    )


if __name__ == "__main__":
    main()
