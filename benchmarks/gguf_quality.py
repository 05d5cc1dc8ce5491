"""Perplexity of demo-moe out of one GGUF file, ours and llama.cpp's: how far the two are apart on the same weights.

python -m benchmarks.gguf_quality --peer-python .venv-peers/bin/python [--types "F16;Q8_0;Q4_0;Q4_K_M"] [--windows 4]

Windows of the second half of each text of models_zoo/eval, as benchmarks.quality; each engine predicts each window's
tokens from those before them, with a KV cache in f32. hetcomp computes in the formats that it takes over or converts to
by itself. Both round activations to int8 before they multiply them with quantised weights, llama.cpp to f16 for F16.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

import hetcomp
from benchmarks import models
from benchmarks.cpu_e2e import show
from benchmarks.quality import MODEL, Accuracy, Logits, evaluate, halves, peer_logits, windows
from benchmarks.record import Record
from benchmarks.worker import Worker
from hetcomp.models_zoo import evaluation_texts, find


def compiled(file: Path, length: int) -> Logits:
    """hetcomp's logits of a GGUF file."""
    target = models.FOLDER / f"{file.stem}-from-gguf.hetc"
    hetcomp.compile(file, context_length=length, formats={"kv": "f32"}, out=target)
    return hetcomp.load(target, threads=1)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default="F16;Q8_0;Q4_0;Q4_K_M", help="llama.cpp's, separated by semicolons")
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=4, help="windows per text")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    options = parser.parse_args()
    models.FOLDER.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(find(MODEL) / "tokenizer.json"))
    texts = [w for _, half in halves(tokenizer) for w in windows(half, options.length, options.windows)]
    conditions = {
        "model": MODEL,
        "texts": [text.name for text in evaluation_texts()],
        "evaluation": f"{options.windows} windows of {options.length} tokens of each text's second half",
    }
    record = Record("gguf-quality", conditions)
    record.versions = {"hetcomp": hetcomp.__version__}
    for kind in options.types.split(";"):
        file = models.gguf(MODEL, options.peer_python, kind)
        with ExitStack() as stack:
            exchange = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            arguments = ("--threads", "1", "--context", str(options.length), "--kv", "f32")
            worker = stack.enter_context(Worker(options.peer_python, "llama_cpp_worker", file, *arguments))
            record.versions |= worker.call("version")
            engines = {"llama.cpp": peer_logits(worker, exchange), "hetcomp": compiled(file, options.length)}
            _report(record, kind, evaluate(engines, "llama.cpp", texts))
    show(record)
    print(record.write())


def _report(record: Record, kind: str, results: dict[str, Accuracy]) -> None:
    ours, theirs = results["hetcomp"], results["llama.cpp"]
    for name, accuracy in results.items():
        record.add(f"{kind}: {name} perplexity", "", accuracy.perplexity, higher_is_better=False)
    difference = ours.loss - theirs.loss
    record.derived[f"{kind}: perplexity of hetcomp against llama.cpp, %"] = 100 * float(np.expm1(difference.mean()))
    record.derived[f"{kind}: KL(llama.cpp || hetcomp)"] = float(ours.divergence.mean())
    record.derived[f"{kind}: same top token, %"] = 100 * float(ours.same_top.mean())


if __name__ == "__main__":
    main()
