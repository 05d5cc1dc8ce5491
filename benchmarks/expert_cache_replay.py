"""How often a decoded token finds its experts in the GPU's slots: recorded routing through the runtime's own policy.

python -m benchmarks.expert_cache_replay [--model demo-moe] [--tokens 6000] [--slots 8] [--per-step 12]
    [--routing FILE.npz]

The routing is that of transformers in float32 on each text of models_zoo/eval, a token a step. Against it stands the
best placement that stays as it is: the experts that the same tokens use most, which nobody knows before. A switch is
from one text to the next; what follows it is compared with the same tokens where the cache has just seen their text.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from benchmarks.cpu_e2e import show
from benchmarks.record import Record
from hetcomp.hardware.compilers import find_cxx
from hetcomp.models_zoo import evaluation_texts, find

_ROOT = Path(__file__).resolve().parents[1]
_FLAGS = ("-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror")
_WINDOW = 1024  # positions of a context: the text goes on in the next
_WARM = 500  # tokens of a text before its hit rate counts
_AFTER = (0, 100, 250, 500, 1000)  # borders of the stretches behind a switch
Routing = NDArray[np.int32]  # [tokens, layers, top_k]


def routing_of(folder: Path, tokens: int) -> dict[str, Routing]:
    """By text: the experts of its first ``tokens`` tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = {}
    for text in evaluation_texts():
        ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0, :tokens]
        parts = [_choices(model, ids[start : start + _WINDOW]) for start in range(0, len(ids), _WINDOW)]
        found[text.stem] = np.concatenate(parts)
    return found


def kept_routing(folder: Path, tokens: int, file: Path | None) -> dict[str, Routing]:
    """The same, read from ``file`` where it is there, else written to it."""
    if file is not None and file.is_file():
        with np.load(file) as kept:
            return {name: kept[name][:tokens] for name in kept.files}
    found = routing_of(folder, tokens)
    if file is not None:
        np.savez(file, allow_pickle=False, **found)
    return found


@torch.inference_mode()
def _choices(model: transformers.PreTrainedModel, ids: torch.Tensor) -> Routing:
    logits = model(ids[None], output_router_logits=True).router_logits
    chosen = [layer.topk(model.config.num_experts_per_tok, dim=-1).indices for layer in logits]
    return torch.stack(chosen, dim=1).to(torch.int32).numpy()


@contextmanager
def replay_program() -> Iterator[Path]:
    """The runtime's policy as a program."""
    source = Path(__file__).with_suffix(".cpp")
    sources = _ROOT / "runtime_lib" / "src"
    with tempfile.TemporaryDirectory(prefix="hetcomp-") as folder:
        program = Path(folder) / source.stem
        command = [find_cxx().path, *_FLAGS, f"-I{sources}", source, sources / "gpu" / "cache_policy.cpp"]
        subprocess.run([*command, "-o", program], check=True)
        yield program


def hits(program: Path, rule: str, routing: Routing, experts: int, slots: int, per_step: int) -> NDArray[np.float64]:
    """Part of each token's choices that found their expert."""
    _, layers, top_k = routing.shape
    command = [str(program), rule, *(str(n) for n in (layers, experts, top_k, slots, per_step))]
    done = subprocess.run(command, check=True, input=np.ascontiguousarray(routing).tobytes(), stdout=subprocess.PIPE)
    return np.frombuffer(done.stdout, np.int32) / (layers * top_k)


def best_static(routing: Routing, experts: int, slots: int) -> float:
    """Part of the choices that go to each layer's most used experts."""
    tokens, layers, top_k = routing.shape
    counts = [np.bincount(routing[:, layer].ravel(), minlength=experts) for layer in range(layers)]
    return float(sum(np.sort(row)[-slots:].sum() for row in counts) / (tokens * layers * top_k))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo-moe")
    parser.add_argument("--tokens", type=int, default=6000, help="of each text")
    parser.add_argument("--slots", type=int, default=8, help="experts of a layer on the GPU")
    parser.add_argument("--per-step", type=int, default=12, help="experts of all layers that are copied under a step")
    parser.add_argument("--routing", type=Path, help="npz that the routing is read from, or written to if it is new")
    o = parser.parse_args()
    folder = find(o.model)
    config = transformers.AutoConfig.from_pretrained(folder)
    experts = int(config.num_experts)
    texts = kept_routing(folder, o.tokens, o.routing)
    conditions = {k: v for k, v in vars(o).items() if k != "routing"}
    record = Record("expert_cache_replay", {**conditions, "experts": experts, "dtype": "float32", "warm": _WARM})
    everything = np.concatenate(list(texts.values()))
    with replay_program() as program:
        for name, routing in texts.items():
            record.add(f"{name}, best static", "%", 100 * best_static(routing[_WARM:], experts, o.slots))
            for rule in ("lru", "lfu"):
                found = hits(program, rule, routing, experts, o.slots, o.per_step)
                record.add(f"{name}, {rule}", "%", 100 * float(found[_WARM:].mean()))
        record.add("all texts, best static", "%", 100 * best_static(everything, experts, o.slots))
        names = list(texts)
        for rule in ("lru", "lfu"):
            for before, name in zip(names, names[1:] + names[:1], strict=True):
                both = np.concatenate([texts[before], texts[name]])
                switched = hits(program, rule, both, experts, o.slots, o.per_step)[len(texts[before]) :]
                again = np.concatenate([texts[name], texts[name]])
                alone = hits(program, rule, again, experts, o.slots, o.per_step)[len(texts[name]) :]
                for start, stop in itertools.pairwise(_AFTER):
                    lost = alone[start:stop].mean() - switched[start:stop].mean()
                    series = f"{rule}, {before} then {name}, tokens {start} to {stop}"
                    record.add(f"{series}", "%", 100 * float(switched[start:stop].mean()))
                    record.derived[f"{series}, points below the text alone"] = 100 * float(lost)
    show(record)
    print(record.write())


if __name__ == "__main__":
    main()
