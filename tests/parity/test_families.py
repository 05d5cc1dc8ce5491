"""Every family, compiled to native code, against transformers in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import hetcomp
from tests.reference.tiny_models import EACH_OP, FAMILIES, OTHERS, build, save_tiny, token_ids
from tests.sampled_cases import rest

# Relative to the largest logit: float32 with another order of summation, three layers deep.
TOLERANCE = 1e-4
CONTEXT = 64


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())


@torch.no_grad()
def reference_logits(model: torch.nn.Module, ids: torch.Tensor) -> np.ndarray:
    return model(input_ids=ids, use_cache=False).logits[0].float().numpy()


# Odd sizes have all paths of even ones, and those for what is left over.
MORE = [*((f, False) for f in FAMILIES), *((f, True) for f in OTHERS)]


@pytest.fixture(scope="module", params=[*((f, True) for f in EACH_OP), *rest(MORE)], ids=str)
def pair(request, tmp_path_factory):
    family, odd = request.param
    folder = tmp_path_factory.mktemp(f"{family}-{odd}")
    model = save_tiny(family, folder / "hf", odd=odd)
    exe = hetcomp.compile(folder / "hf", formats="f32", context_length=CONTEXT, out=folder / "tiny.hetc")
    return model, exe


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_prefill_logits(pair, tokens):
    model, exe = pair
    ids = token_ids(model, tokens)
    assert relative_error(exe(ids[0].tolist()), reference_logits(model, ids)) < TOLERANCE


@pytest.mark.slow
def test_decode_logits_and_greedy_tokens(pair):
    model, exe = pair
    prompt = token_ids(model, 9, seed=3)
    session = exe.runtime.session()
    logits = session.prefill(prompt[0].tolist())
    ids = prompt
    for _ in range(16):
        want = reference_logits(model, ids)[-1]
        assert relative_error(logits, want) < TOLERANCE
        assert int(logits.argmax()) == int(want.argmax())
        ids = torch.cat([ids, torch.tensor([[int(want.argmax())]])], dim=1)
        logits = exe.runtime.decode([session], [int(ids[0, -1])])[0]
    session.close()
    generated = [t.id for t in exe.generate(prompt[0].tolist(), max_new_tokens=16, ignore_eos=True)]
    assert generated == ids[0, prompt.shape[1] :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(("kv", "bound"), [("q8", 0.04), ("fp8", 0.16)])
@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_coarse_kv_cache_through_prefill_and_decode(family, kv, bound, tmp_path):
    """Codes of q8 are off by at most 1/254 of their group's largest magnitude: logits by some 2 % of the largest in
    these tiny models, where a head is one or two groups. Those of fp8 are off by up to 1/16 of the number, four times
    as much in the mean. The median over steps, because a step in which a random router flips between near ties is off
    by much more."""
    model = save_tiny(family, tmp_path / "hf")
    formats = {"experts": "f32", "attention": "f32", "dense": "f32", "embedding": "f32", "kv": kv}
    exe = hetcomp.compile(tmp_path / "hf", formats=formats, context_length=CONTEXT, out=tmp_path / "tiny.hetc")
    ids = token_ids(model, 40, seed=3)
    session = exe.runtime.session()
    logits = session.prefill(ids[0, :20].tolist())
    errors = []
    for length in range(20, 40):
        errors.append(relative_error(logits, reference_logits(model, ids[:, :length])[-1]))
        logits = exe.runtime.decode([session], [int(ids[0, length])])[0]
    session.close()
    assert 1e-4 < np.median(errors) < bound


@pytest.mark.slow
def test_module_in_memory_gives_the_same_as_its_folder(tmp_path: Path):
    folder = tmp_path / "hf"
    save_tiny("qwen3_moe", folder)
    from_module = hetcomp.compile(build("qwen3_moe"), formats="f32", context_length=CONTEXT)
    from_folder = hetcomp.compile(folder, formats="f32", context_length=CONTEXT)
    np.testing.assert_array_equal(from_module([5, 6, 7]), from_folder([5, 6, 7]))
