"""What a plan's line on converted weights must say of their error, computed without the packer."""

from __future__ import annotations

import re

import numpy as np

from hetcomp.frontend.checkpoint import BaseCheckpoint
from hetcomp.ir.plan import Plan
from hetcomp.quantised_numbers import QuantisedNumbers


def assert_q8_notes(plan: Plan, checkpoint: BaseCheckpoint, stored: str, why: str) -> set[str]:
    """The plan has lines on weights that are stored as ``stored`` and become q8 for ``why``, each with the error of
    one: that of codes of 8 bits with a scale for 32 columns. Returns the roles that they name."""
    roles = set()
    for note in (n for n in plan.notes if f" weights are stored as {stored} and converted to q8, for " in n):
        assert why in note
        found = re.search(r"the error of (\S+) (\(expert 0\) )?is (\S+) \(relative RMS\)$", note)
        assert found is not None, note
        value = next(v for v in plan.values if found[1] in (v.fqn, v.id))
        read = checkpoint.read_expert(value, 0) if found[2] else checkpoint.read(value)
        numbers = read.to_f32() if isinstance(read, QuantisedNumbers) else np.asarray(read)
        # A scale's rounding to fp16, 2^-11 of it, moves a few numbers to the next code.
        assert np.isclose(float(found[3]), _error(numbers.astype(np.float64)), rtol=0.05), note
        roles.add(note.split()[1])
    assert len([n for n in plan.notes if "converted to q8" in n]) == len(roles), plan.notes
    return roles


def _error(numbers: np.ndarray) -> float:
    """Relative RMS of rounding to multiples of a 127th of a group's largest number."""
    padding = [(0, 0)] * (numbers.ndim - 1) + [(0, -numbers.shape[-1] % 32)]
    groups = np.pad(numbers, padding).reshape(-1, 32)
    step = np.abs(groups).max(-1, keepdims=True) / 127
    step[step == 0] = 1
    return float(np.linalg.norm(np.rint(groups / step) * step - groups) / np.linalg.norm(groups))
