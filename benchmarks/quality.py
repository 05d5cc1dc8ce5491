"""Quality of weight formats on real text: KL divergence from f32 and perplexity of demo-moe, ours and llama.cpp's.

python -m benchmarks.quality [--formats "q8;q4;q4,embedding=q8"] [--peer-python .venv-peers/bin/python] [--windows 8]

The first half of each text of models_zoo/eval is calibration: formats marked with "+importance" and llama.cpp's types
so marked get column importances made from it, all from the same file; those marked with "+feedback" second moments
too, with which errors are fed back. The second half is cut into windows; every engine predicts each window's tokens
from those before them. The reference is hetcomp in f32, the KL divergence is that of the reference's distribution over
the whole vocabulary from the engine's, in nats, by token. The KV cache is f32 in every engine unless a format says
otherwise, so that only weights (and the int8 activations that q8 and q4 are multiplied with, there as here) count.
Bits a weight are of all matrices but the routers, scales included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer

import hetcomp
from benchmarks import models
from benchmarks.cpu_e2e import show
from benchmarks.record import Record
from benchmarks.worker import Worker
from hetcomp.backends import packing
from hetcomp.importance_from_text import importance_from_text
from hetcomp.models_zoo import evaluation_texts, find
from hetcomp.passes.context import ROLES

MODEL = "demo-moe"
FORMATS = (
    "bf16;q8;fp8;mxfp4;q4;q4,embedding=q8;q4,embedding=q8,attention=q8;f32,kv=q8;"
    "q4+importance;q4,embedding=q8,attention=q8+importance;"
    "mxfp4+feedback;q4+feedback;q4,embedding=q8+feedback;q4,embedding=q8,attention=q8+feedback"
)
PEER_TYPES = "F32;BF16;Q8_0;Q4_0;Q4_K_M;Q4_0+importance;Q4_K_M+importance"
MARKS = {"importance": False, "feedback": True}  # whether with second moments

Logits = Callable[[list[int]], NDArray[np.float32]]


@dataclass
class Accuracy:
    """Against the reference, by predicted token: loss f64 [tokens] (nats), KL divergence f64 [tokens] (nats), and
    whether the most likely token is the same, bool [tokens].
    """

    loss: NDArray[np.float64]
    divergence: NDArray[np.float64]
    same_top: NDArray[np.bool_]

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return float(np.exp(self.loss.mean()))

    def share_of_worst(self, share: float = 0.01) -> float:
        """What part of the summed divergence the ``share`` of tokens that diverge most has."""
        worst = np.sort(self.divergence)[-max(1, round(share * len(self.divergence))) :]
        return float(worst.sum() / max(self.divergence.sum(), 1e-300))


def halves(tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[int]]]:
    """Tokens of the first and of the second half of each evaluation text."""
    for text in evaluation_texts():
        ids = tokenizer.encode(text.read_text()).ids
        yield ids[: len(ids) // 2], ids[len(ids) // 2 :]


def windows(ids: list[int], length: int, count: int) -> list[list[int]]:
    """``count`` windows of ``length`` tokens, evenly spread over ``ids``."""
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return [ids[start : start + length] for start in starts]


def evaluate(engines: Mapping[str, Logits], reference: str, texts: list[list[int]]) -> dict[str, Accuracy]:
    """Accuracy of every engine on ``texts``, with ``engines[reference]`` as the reference distribution."""
    found: dict[str, list[Accuracy]] = {name: [] for name in engines}
    for done, ids in enumerate(texts, 1):
        base = _log_softmax(engines[reference](ids)[:-1])
        chances, targets = np.exp(base), np.array(ids[1:])
        for name, engine in engines.items():
            log_q = base if name == reference else _log_softmax(engine(ids)[:-1])
            found[name].append(
                Accuracy(
                    -log_q[np.arange(len(targets)), targets],
                    (chances * (base - log_q)).sum(-1),
                    base.argmax(-1) == log_q.argmax(-1),
                )
            )
        print(f"window {done} of {len(texts)}", flush=True)
    return {
        name: Accuracy(
            *(np.concatenate([getattr(part, f) for part in parts]) for f in ("loss", "divergence", "same_top"))
        )
        for name, parts in found.items()
    }


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def formats_by_role(text: str) -> dict[str, str]:
    """``q4,embedding=q8``: q4 for every role but the embedding; routers and the KV cache are f32 unless named."""
    base, *exceptions = text.split(",")
    by_role = dict.fromkeys(ROLES, base) | {"router": "f32", "kv": "f32"}
    return by_role | dict(part.split("=") for part in exceptions)


def bits_per_weight(artifact: Path) -> float:
    """Of an artifact's matrices but the routers, scales included."""
    matrices = [v for v in models.plan(artifact).values if v.type.layout in (packing.PANELS, packing.PANELS_GLU)]
    chosen = [v for v in matrices if not (v.fqn or "").endswith("mlp.gate.weight")]
    return 8 * sum(map(packing.packed_bytes, chosen)) / sum(v.type.numel({}) for v in chosen)


def peer_logits(worker: Worker, folder: Path) -> Logits:
    """Logits of a worker, which come in a file."""

    def logits(ids: list[int]) -> NDArray[np.float32]:
        file = folder / "logits.npy"
        worker.call("all_logits", prompt=ids, file=str(file))
        result: NDArray[np.float32] = np.load(file)
        return result

    return logits


def calibration(folder: Path, texts: list[list[int]]) -> dict[str, Path]:
    """The importance file of each mark."""
    files = {mark: models.FOLDER / f"{MODEL}-{mark}.safetensors" for mark in MARKS}
    for mark, moments in MARKS.items():
        importance_from_text(folder, texts, files[mark], second_moments=moments)
    return files


def quantised_gguf(peer_python: Path, source: Path, kind: str, importance: Path) -> tuple[Path, float, str]:
    """The file that llama.cpp makes of ``source``, its bits a weight and its tensors' types."""
    target = models.FOLDER / f"{MODEL}-{kind}.gguf"
    name, _, mark = kind.partition("+")
    command = [str(peer_python), "-m", "benchmarks.quantise_gguf", str(source), str(target), name]
    command += ["--importance", str(importance)] if mark else []
    repository = models.FOLDER.parent.parent
    result = subprocess.run(command, check=True, cwd=repository, stdout=subprocess.PIPE, text=True)
    contents = json.loads(result.stdout.splitlines()[-1])
    return target, 8 * contents["bytes"] / contents["weights"], json.dumps(contents["types"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=FORMATS, help="ours, separated by semicolons")
    parser.add_argument("--peer-types", default=PEER_TYPES, help="llama.cpp's, separated by semicolons")
    parser.add_argument("--peer-python", type=Path, default=None)
    parser.add_argument("--windows", type=int, default=8, help="windows per text")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    options = parser.parse_args()
    folder = find(MODEL)
    texts = list(halves(Tokenizer.from_file(str(folder / "tokenizer.json"))))
    chosen = [window for _, second in texts for window in windows(second, options.length, options.windows)]
    record = Record(
        "quality",
        {
            "model": MODEL,
            "texts": [text.name for text in evaluation_texts()],
            "calibration": "first half of each text",
            "evaluation": f"{options.windows} windows of {options.length} tokens of each text's second half",
            "tokens": sum(len(ids) - 1 for ids in chosen),
        },
    )
    models.FOLDER.mkdir(parents=True, exist_ok=True)
    files = calibration(folder, [first for first, _ in texts])
    engines: dict[str, Logits] = {}
    for formats in ("f32", *options.formats.split(";")):
        target = models.FOLDER / f"{MODEL}-{formats}.hetc"
        wanted, _, mark = formats.partition("+")
        hetcomp.compile(
            folder,
            context_length=options.length,
            formats=formats_by_role(wanted),
            importance=files.get(mark),
            out=target,
        )
        engines[f"hetcomp {formats}"] = hetcomp.load(target, threads=1)
        record.derived[f"hetcomp {formats}: bits a weight"] = bits_per_weight(target)
        print(f"compiled {formats}", flush=True)
    record.versions = {"transformers": transformers.__version__, "hetcomp": hetcomp.__version__}
    with ExitStack() as stack:
        if options.peer_python is not None:
            exchange = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            source = models.gguf(MODEL, options.peer_python)
            for kind in options.peer_types.split(";"):
                file, bits, types = quantised_gguf(options.peer_python, source, kind, files["importance"])
                arguments = ("--threads", "1", "--context", str(options.length), "--kv", "f32")
                worker = stack.enter_context(Worker(options.peer_python, "llama_cpp_worker", file, *arguments))
                engines[f"llama.cpp {kind}"] = peer_logits(worker, exchange)
                record.derived[f"llama.cpp {kind}: bits a weight"] = bits
                record.conditions[f"llama.cpp {kind}: types of its tensors"] = types
                record.versions |= worker.call("version")
        results = evaluate(engines, "hetcomp f32", chosen)
    _report(record, results)
    _compare(record, results, options.length - 1)
    show(record)
    print(record.write())


def _report(record: Record, results: Mapping[str, Accuracy]) -> None:
    for name, accuracy in results.items():
        record.add(f"{name} perplexity", "", accuracy.perplexity, higher_is_better=False)
        record.derived[f"{name}: perplexity against f32, %"] = 100 * (
            accuracy.perplexity / results["hetcomp f32"].perplexity - 1
        )
        record.derived[f"{name}: KL(f32 || it)"] = float(accuracy.divergence.mean())
        record.derived[f"{name}: standard error of KL"] = float(
            accuracy.divergence.std() / np.sqrt(len(accuracy.divergence))
        )
        record.derived[f"{name}: median KL"] = float(np.median(accuracy.divergence))
        record.derived[f"{name}: part of KL in the worst 1 % of tokens"] = accuracy.share_of_worst()
        record.derived[f"{name}: same top token, %"] = 100 * float(accuracy.same_top.mean())


def _compare(record: Record, results: Mapping[str, Accuracy], window: int) -> None:
    """Perplexity and KL of each of ours against each peer's, with the standard errors of the differences: those of the
    windows' means, since tokens of one window are not independent."""
    for ours, theirs in itertools.product(results, results):
        if not (ours.startswith("hetcomp") and theirs.startswith("llama.cpp")) or ours == "hetcomp f32":
            continue
        pairs = {"log perplexity": "loss", "KL": "divergence"}
        for what, field in pairs.items():
            difference = getattr(results[ours], field) - getattr(results[theirs], field)
            means = difference.reshape(-1, window).mean(axis=1)
            record.derived[f"{ours} - {theirs}: {what}"] = float(means.mean())
            record.derived[f"{ours} - {theirs}: {what}, standard error"] = float(means.std(ddof=1) / len(means) ** 0.5)


if __name__ == "__main__":
    main()
