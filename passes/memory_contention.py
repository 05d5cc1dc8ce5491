"""How much longer reads by CPU cores and copies to GPUs take while both use the host's memory.

runtime_lib/src/gpu/stream_split.cpp has the same in C++. docs/decisions/expert-streaming.md says what was measured.
"""

from __future__ import annotations

# Beside copies at 55 GB/s, of a machine that gives 146 to both together, experts that read 37 GB/s of weights took 10 %
# longer than alone, those of 22 GB/s 8 %, those of 10 GB/s no longer: about half of u (1 - u), where u is their part of
# the memory's rate. Near u = 1 that rate bounds both instead.
_READS = 0.5
# The link carried 52.4 of 55.1 GB/s beside such experts.
_COPIES = 1.05


def reads_slowdown(read: float, copied: float, joint: float) -> float:
    """Of CPU cores that alone read ``read`` GB/s, beside copies at ``copied`` GB/s; ``joint``: what the memory gives to
    both."""
    if not read or not copied:
        return max(1.0, (read + copied) / joint)
    part = min(1.0, read / joint)
    return max(1.0 + _READS * part * (1.0 - part), (read + copied) / joint)


def copies_slowdown(read: float, copied: float, joint: float) -> float:
    """Of copies at ``copied`` GB/s beside CPU cores that read ``read`` GB/s."""
    return max(_COPIES if read and copied else 1.0, (read + copied) / joint)
