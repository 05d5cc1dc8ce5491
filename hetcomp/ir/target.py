"""What the passes may ask of the backends, the checkpoint and the model itself, without importing any of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from hetcomp.ir.annotations import DeferralQuality
from hetcomp.ir.deferral import LayerChoices
from hetcomp.ir.plan import Op, Template, Value, WeightSource


class KernelTarget(Protocol):
    """Facts about the kernels that the backends will choose; asked by plan_memory and choose_formats."""

    def workspace_bytes(self, op: Op, template: Template, dims: Mapping[str, int]) -> int:
        """Bytes of scratch memory that the op's kernel needs at the given dimension sizes."""
        ...

    def weight_layout(self, op: Op, operand: int, act_order: bool) -> str:
        """Layout in which input ``operand`` of the op is stored: ``row_major`` or a packed one; ``act_order``: one
        whose columns have an order of their own, if the op's kernels have such."""
        ...

    def gpu_refusal(self, op: Op, template: Template) -> str | None:
        """Why no GPU code can be generated for the op, one sentence; None if it can."""
        ...

    def packed_bytes(self, value: Value) -> int:
        """Bytes of the weight once packed in ``value.format`` (padding and scales included)."""
        ...

    def pair_bytes(self, value: Value, rank: int) -> int:
        """Bytes of an adapter's pair of that rank for the weight."""
        ...


class Checkpoint(Protocol):
    """Weights on disk or in memory, known by their headers; asked by bind_weights."""

    @property
    def origin(self) -> str:
        """Folder or description for messages."""
        ...

    def source(self, value: Value) -> WeightSource:
        """Where the weight ``value`` comes from, with its checked shape.

        Raises HetcompError if a tensor is missing or has another shape or an unusable dtype.
        """
        ...


class DeferralMeasure(Protocol):
    """What deferring experts does to the model's output; asked by defer_experts. A candidate is what every MoE layer of
    the model defers, in the order of the step."""

    def rough_kl(self, candidates: Sequence[Sequence[LayerChoices]]) -> Sequence[float]:
        """The KL divergence with each candidate on a part of the text, the same for all: to compare them."""
        ...

    def most_within(
        self, candidates: Sequence[Sequence[LayerChoices]], max_kl: float
    ) -> tuple[int, DeferralQuality] | None:
        """Of candidates, each of which defers more than the one before, the number of the last whose KL divergence on
        the whole text is at most ``max_kl``, and its quality; None where the first exceeds it."""
        ...
