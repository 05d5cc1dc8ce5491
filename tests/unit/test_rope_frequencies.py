"""Frequencies found in the cosines of a few positions are those of positions far behind."""

from __future__ import annotations

import pytest
import torch

from hetcomp.frontend.onnx.rope_frequencies import fit


@pytest.mark.parametrize("base", [10_000.0, 150_000.0, 500_000.0, 1_000_000.0, 5_000_000.0])
def test_a_few_positions_tell_the_models_own_frequencies(base):
    frequencies = 1.0 / base ** (torch.arange(0, 128, 2).float() / 128)  # as transformers computes them

    def tables(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.arange(first, first + count).float()[:, None] * frequencies
        return angles.cos(), angles.sin()

    found = fit(*tables(0, 23), 0, ())
    assert torch.equal(torch.tensor(found.inv_freq), frequencies)
    found.check(*tables(131_071, 1), 131_071)
