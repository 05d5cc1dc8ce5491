"""Constants of the CPU kernels that suit a machine's caches and memory, and the trials that chose them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hetcomp.hardware.figures import Model

Constant = Literal["prefetch_bytes", "draw_bytes", "task_blocks", "gemv_rows"]
Ratio = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]


class Tuning(Model):
    """What the kernels of one family of weight formats are rendered with.

    ``prefetch_bytes``: how far software prefetch runs ahead of the loads of weights. ``draw_bytes``: weights of the
    tasks that a thread takes at a time in decode, at most. ``task_blocks``: blocks of tokens in a task of prefill.
    ``gemv_rows``: tokens up to which a linear op streams its weights against single rows of activations.
    """

    prefetch_bytes: int = Field(ge=64, le=1 << 16, multiple_of=64)
    draw_bytes: int = Field(ge=4096, le=1 << 26)
    task_blocks: int = Field(ge=1, le=1024)
    gemv_rows: int = Field(ge=1, le=16)


class Trial(Model):
    """A value of a constant that was timed. ``speedup``: how much faster kernels were with it than with the value that
    stood until then: the smaller of the median of ``samples`` (one of every round) and the ratio of the lower
    quartiles of the times."""

    constant: Constant
    value: int = Field(ge=1)
    speedup: Ratio
    samples: tuple[Ratio, ...] = Field(min_length=1)


class KernelTuning(Model):
    """The constants that were found on ``isa`` with weights of ``weight_format``; they serve all formats whose
    kernels are of the same family (``CpuIsa.family``). Of constants that no trial names the default was not doubted."""

    isa: str
    weight_format: str
    constants: Tuning
    trials: tuple[Trial, ...] = ()
