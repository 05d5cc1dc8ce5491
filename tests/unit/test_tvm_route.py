"""route of the TVM backend against torch, written as the docstring of ops.Route says it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetcomp.backends.protocol import Isa
from hetcomp.errors import HetcompError
from hetcomp.ir import ops
from hetcomp.ir.types import DType
from tests.reference.tvm_harness import BACKEND, machine_isas, request, run, value
from tests.sampled_cases import rest

pytestmark = pytest.mark.spread("isa")
ISAS = machine_isas()


def reference(attrs: ops.Route, logits: np.ndarray, bias: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """ids and weights in float32 by torch; a stable sort makes equal scores go to the lower expert."""
    raw = torch.from_numpy(logits)
    scores = {"softmax": raw.softmax(-1), "sigmoid": raw.sigmoid()}.get(attrs.scoring, raw)
    choice = scores if bias is None else scores + torch.from_numpy(bias)
    if attrs.groups > 1:
        grouped = choice.view(len(raw), attrs.groups, -1)
        best = grouped.max(-1).values if attrs.group_score == "max" else grouped.topk(2, -1).values.sum(-1)
        kept = best.sort(dim=-1, descending=True, stable=True).indices[:, : attrs.top_groups]
        mask = torch.zeros_like(best).scatter_(1, kept, 1.0).bool()
        outside = float("-inf") if attrs.outside_groups == "never" else 0.0
        choice = grouped.masked_fill(~mask[:, :, None], outside).view_as(raw)
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, : attrs.top_k]
    weights = scores.gather(1, ids)
    if attrs.scoring == "topk_softmax":
        weights = weights.softmax(-1)
    if attrs.scoring == "sparse_mixer":
        weights = sparse_mixer(raw, attrs.top_k, attrs.jitter)
    if attrs.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + attrs.norm_eps)
    return ids.numpy(), (weights * attrs.scaling).numpy()


def sparse_mixer(raw: torch.Tensor, top_k: int, jitter: float) -> torch.Tensor:
    """Weights of the choices, as transformers' phimoe computes them for two."""
    left, weights = raw, []
    for _ in range(top_k):
        best, chosen = left.max(-1, keepdim=True)
        far = (best - raw) / raw.abs().clamp(min=best) > 2 * jitter
        weights.append(left.masked_fill(far, float("-inf")).softmax(-1).gather(-1, chosen))
        left = left.scatter(-1, chosen, float("-inf"))
    return torch.cat(weights, -1)


def _run(attrs: ops.Route, logits: np.ndarray, bias: np.ndarray | None, isa: Isa, threads: int = 2):
    rows = len(logits)
    ins = [value("l", ("T", attrs.experts))]
    arrays = [logits]
    if bias is not None:
        ins.append(value("b", (attrs.experts,)))
        arrays.append(bias)
    outs = [value("i", ("T", attrs.top_k), DType.I32), value("w", ("T", attrs.top_k))]
    kernel = BACKEND.emit(request(attrs, ins, outs, isa))
    shape = (rows, attrs.top_k)
    return run(kernel, isa, arrays, [(shape, np.int32), (shape, np.float32)], rows, threads)


VARIANTS = [
    ops.Route(32, 4, "topk_softmax", normalise=False),  # GPT-OSS
    ops.Route(128, 8, "softmax", normalise=True),  # Qwen3-MoE
    ops.Route(
        256, 8, "sigmoid", True, 1e-20, groups=8, top_groups=4, group_score="top2", scaling=2.5, bias=True
    ),  # DeepSeek-V3
    ops.Route(160, 6, "softmax", False, groups=8, top_groups=3, outside_groups="zero", scaling=16.0),  # DeepSeek-V2
    ops.Route(33, 3, "sigmoid", True, 1e-20, scaling=1.5, bias=True),  # GLM-4-MoE, MiniMax-M2; odd size
    ops.Route(21, 3, "sparse_mixer", normalise=True, jitter=0.1, scaling=0.5),
    ops.Route(7, 7, "softmax", normalise=True),
    ops.Route(600, 5, "softmax", normalise=False),
]
# The same with sizes in between.
MORE = [
    ops.Route(60, 4, "softmax", normalise=True),  # Qwen2-MoE
    ops.Route(8, 2, "softmax", normalise=True),  # Mixtral
    ops.Route(64, 8, "softmax", normalise=False),  # OLMoE
    ops.Route(16, 2, "sparse_mixer", normalise=False, jitter=0.01),  # Phi-MoE
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("attrs", [*VARIANTS, *rest(MORE)], ids=lambda a: f"{a.scoring}-{a.experts}-{a.groups}")
def test_every_variant(attrs: ops.Route, isa: Isa):
    rng = np.random.default_rng(attrs.experts)
    for rows, scale in ((1, 1.0), (200, 3.0)):
        logits = (rng.standard_normal((rows, attrs.experts)) * scale).astype(np.float32)
        bias = rng.uniform(-0.2, 0.2, attrs.experts).astype(np.float32) if attrs.bias else None
        ids, weights = _run(attrs, logits, bias, isa)
        want_ids, want_weights = reference(attrs, logits, bias)
        # Scores that differ by the last bit of exp may change places.
        same = (ids == want_ids).all(-1)
        assert same.mean() > 0.98
        np.testing.assert_allclose(weights[same], want_weights[same], rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "topk_softmax"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_equal_scores_go_to_the_lower_expert(scoring: str, isa: Isa, data: st.DataObject):
    """Few distinct logits, many ties: the choice must be the stable sort's, without any tolerance."""
    attrs = ops.Route(21, 5, scoring, normalise=True)  # type: ignore[arg-type]
    rows = data.draw(st.integers(1, 4))
    logits = np.array(
        data.draw(st.lists(st.sampled_from([-2.0, 0.0, 1.0, 3.0]), min_size=21 * rows, max_size=21 * rows)),
        np.float32,
    ).reshape(rows, 21)
    ids, weights = _run(attrs, logits, None, isa)
    want = np.argsort(-logits, -1, kind="stable")[:, :5]
    np.testing.assert_array_equal(ids, want)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("outside", "want"), [("never", [[0, 1]]), ("zero", [[2, 3]])])
def test_experts_outside_of_the_best_groups(outside: str, want: list[list[int]], isa: Isa):
    """With a negative bias everywhere a score of 0.0 wins over every allowed one, as in DeepSeek-V2's
    code."""
    attrs = ops.Route(8, 2, "sigmoid", True, groups=4, top_groups=1, outside_groups=outside, bias=True)  # type: ignore[arg-type]
    logits, bias = np.zeros((1, 8), np.float32), np.full(8, -5.0, np.float32)
    ids, _ = _run(attrs, logits, bias, isa)
    np.testing.assert_array_equal(ids, want)
    np.testing.assert_array_equal(reference(attrs, logits, bias)[0], want)


@pytest.mark.parametrize("isa", ISAS)
def test_ids_stay_in_range_whatever_the_logits(isa: Isa):
    attrs = ops.Route(20, 4, "softmax", normalise=True)
    logits = np.zeros((5, 20), np.float32)
    logits[0] = np.nan
    logits[1, 3] = np.nan
    logits[2] = -np.inf
    logits[3] = np.inf
    logits[4, :3] = [np.inf, -np.inf, 88.0]
    ids, _ = _run(attrs, logits, None, isa)
    assert ids.min() >= 0 and ids.max() < 20


@pytest.mark.parametrize("isa", ISAS)
def test_minus_infinity_logits_are_chosen_last_and_once(isa: Isa):
    attrs = ops.Route(6, 4, "topk_softmax", normalise=False)
    logits = np.array([[-np.inf, 1.0, -np.inf, 2.0, -np.inf, -np.inf]], np.float32)
    ids, weights = _run(attrs, logits, None, isa)
    np.testing.assert_array_equal(ids, [[3, 1, 0, 2]])
    np.testing.assert_allclose(weights[0], [0.7310586, 0.26894143, 0, 0], atol=1e-7)


@pytest.mark.parametrize("isa", ISAS)
def test_a_sparse_mixer_of_equal_and_negative_logits(isa: Isa):
    """0 / 0 for a distance is near, as in transformers' code; negative logits are compared with their own size."""
    attrs = ops.Route(5, 2, "sparse_mixer", normalise=False, jitter=0.01)
    logits = np.array([[0, 0, 0, 0, 0], [-1, -1.019, -1.03, -9, -9], [3, 2.95, 2.92, -1, 0]], np.float32)
    ids, weights = _run(attrs, logits, None, isa)
    np.testing.assert_array_equal(ids, [[0, 1]] * 3)
    np.testing.assert_allclose(weights, sparse_mixer(torch.from_numpy(logits), 2, 0.01), rtol=3e-6)
    np.testing.assert_allclose(weights[0], [1 / 5, 1 / 4], rtol=1e-6)


def test_impossible_routers_are_refused():
    ins = [value("l", ("T", 8))]
    outs = [value("i", ("T", 2), DType.I32), value("w", ("T", 2))]
    for attrs in (
        ops.Route(8, 9, "softmax", False),
        ops.Route(8, 2, "softmax", False, groups=3),
        ops.Route(8, 2, "softmax", False, groups=2, top_groups=3),
        ops.Route(8, 2, "sigmoid", False, groups=8, top_groups=2, group_score="top2"),
    ):
        with pytest.raises(HetcompError, match=r"router at model\.layers\.0\.test"):
            BACKEND.emit(request(attrs, ins, outs, ISAS[0]))
