"""The trained demo model: greedy text equal to transformers, bf16 weights and a q8 KV cache close to f32."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import transformers

import hetcomp
from hetcomp.models_zoo import find
from tests.sampled_cases import rest

PROMPTS = ("It was a bright cold day", *rest(("def main(argv):\n", "Question: what is 12 + 30?")))


@pytest.fixture(scope="module", autouse=True)
def optimisation() -> None:
    """That of users, not of the tiny models beside it."""


@pytest.fixture(scope="module")
def reference():
    model = transformers.AutoModelForCausalLM.from_pretrained(find("demo-moe"), dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(find("demo-moe"))


FORMATS = {
    "f32": "f32",
    "bf16": "bf16",
    "q8 cache": {"experts": "f32", "attention": "f32", "dense": "f32", "embedding": "f32", "kv": "q8"},
}


@pytest.fixture(scope="module")
def executable(tmp_path_factory):
    """Compiles the model in a format by its name, once."""
    folder = tmp_path_factory.mktemp("demo")

    @functools.cache
    def compiled(name: str) -> hetcomp.Executable:
        out = folder / f"{name}.hetc"
        return hetcomp.compile(find("demo-moe"), formats=FORMATS[name], context_length=512, out=out)

    return compiled


@pytest.mark.slow
@pytest.mark.parametrize("prompt", PROMPTS)
@torch.no_grad()
def test_128_greedy_tokens_equal_transformers(reference, tokenizer, executable, prompt):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    want = reference.generate(ids, max_new_tokens=128, do_sample=False, eos_token_id=None, pad_token_id=3)
    got = [t.id for t in executable("f32").generate(prompt, max_new_tokens=128, ignore_eos=True)]
    assert got == want[0, ids.shape[1] :].tolist()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["q8 cache", *rest(["bf16"])])
def test_coarser_formats_stay_close_to_f32(reference, tokenizer, executable, name):
    """Mean KL(f32 || it) < 1e-3 and perplexity within 0.1 %, on a part of the evaluation texts (all of them:
    benchmarks/quality.py)."""
    divergence, losses = [], {"f32": [], name: []}
    for path in sorted(find("demo-moe").parent.joinpath("eval").glob("*.txt")):
        ids = tokenizer(path.read_text()[:4000]).input_ids[:400]
        want = reference(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
        exact = _log_softmax(executable("f32")(ids))
        np.testing.assert_allclose(exact, want, atol=2e-3)
        rounded = _log_softmax(executable(name)(ids))
        divergence.append((np.exp(exact) * (exact - rounded)).sum(-1))
        for form, logs in (("f32", exact), (name, rounded)):
            losses[form].append(-logs[np.arange(len(ids) - 1), ids[1:]])
    assert np.concatenate(divergence).mean() < 1e-3
    perplexity = {form: float(np.exp(np.concatenate(parts).mean())) for form, parts in losses.items()}
    assert abs(perplexity[name] / perplexity["f32"] - 1) < 1e-3


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
