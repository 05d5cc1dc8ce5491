"""Numbers that went through float32, as they were written before."""

from __future__ import annotations

import numpy as np


def decimal(number: float) -> float:
    """The shortest decimal that is ``number`` in float32: 1e-6, not 9.99999997e-7."""
    return float(str(np.float32(number)))
