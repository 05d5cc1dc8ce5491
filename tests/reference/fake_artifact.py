"""An artifact around runtime_lib/tests/fake_program.cpp: results that numpy computes exactly, without the compiler.

logits[v] = sum over positions p of (p % 5 + 1) * embed[ids[p]] . head[v], all small whole numbers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from hetcomp import installed_runtime
from hetcomp.artifact.chat_template import compile_chat_template, template_bytes
from hetcomp.artifact.tokenizer import compile_tokenizer

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "models_zoo" / "demo-moe"
VOCAB = 8192  # that of the demo model, whose tokenizer is used
WIDTH = 8
CONTEXT = 64
MAX_BATCH = 2
EOS = 2


def _numbers(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).integers(-3, 4, (VOCAB, WIDTH)).astype(np.float32)


class FakeModel:
    """The numpy side of the artifact."""

    def __init__(self) -> None:
        self.embed, self.head = _numbers(1), _numbers(2)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Float32 [T, vocab]."""
        factors = np.arange(len(ids)) % 5 + 1
        sums = np.cumsum(factors[:, None] * self.embed[list(ids)], axis=0)
        return (sums @ self.head.T).astype(np.float32)

    def greedy(self, ids: Sequence[int], n: int) -> list[int]:
        """The n tokens that greedy decoding appends."""
        all_ids = list(ids)
        for _ in range(n):
            all_ids.append(int(self.logits(all_ids)[-1].argmax()))
        return all_ids[len(ids) :]


def build_program(folder: Path, *definitions: str) -> Path:
    """Compiles the fake program for the demo model's vocabulary. definitions: NAME=VALUE for the compiler."""
    target = folder / "fake_program.so"
    source = ROOT / "runtime_lib" / "tests" / "fake_program.cpp"
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", f"-DFAKE_VOCAB={VOCAB}"]
    command += [f"-D{definition}" for definition in definitions]
    include = f"-I{installed_runtime.include()}"
    subprocess.run([*command, include, str(source), "-o", str(target)], check=True)
    return target


def write_artifact(folder: Path, program: Path, *, text: bool = True) -> None:
    """Writes the artifact into ``folder``; ``text``: with the demo model's tokenizer and chat template."""
    (folder / "kernels").mkdir(parents=True)
    shutil.copyfile(program, folder / "kernels" / "lib.so")
    (folder / "plan.json").write_text("{}")
    names = {"plan.json", "kernels/lib.so"}
    if text:
        tokenizer, template = compile_tokenizer(DEMO), compile_chat_template(DEMO)
        assert tokenizer is not None and template is not None
        (folder / "chat_template.hetc.json").write_bytes(template_bytes(template))
        names |= {tokenizer.write(folder).name, "chat_template.hetc.json"}
    model = FakeModel()
    data = [model.embed.tobytes(), model.head.tobytes()]
    (folder / "weights.safetensors").write_bytes(b"".join(data))
    files: dict[str, dict[str, object]] = {
        name: {
            "bytes": (folder / name).stat().st_size,
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
        for name in names
    }
    files["weights.safetensors"] = {"bytes": sum(map(len, data))}
    manifest = {
        "schema": [1, 0],
        "model": {
            "name": "fake",
            "architecture": "Fake",
            "vocab": VOCAB,
            "context": CONTEXT,
            "max_batch": MAX_BATCH,
            "max_tokens": 7,
            "max_logit_rows": 5,
            "eos_token_ids": [EOS],
            "bos_token_id": None,
        },
        "files": files,
        "programs": [{"isa": "avx2", "file": "kernels/lib.so"}],
        "weights": [
            {
                "name": name,
                "file": "weights.safetensors",
                "offset": i * len(data[0]),
                "bytes": len(data[i]),
                "xxh3_64": xxhash.xxh3_64_hexdigest(data[i]),
            }
            for i, name in enumerate(("embed", "head"))
        ],
        "states": [{"name": "kv", "bytes_per_slot": CONTEXT * WIDTH * 4}],
        "timers": ["append", "logits"],
        "tokenizer": "tokenizer.hetc.json" if text else None,
        "chat_template": "chat_template.hetc.json" if text else None,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
