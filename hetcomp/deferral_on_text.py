"""Measures on text what deferring experts does to a model of transformers, in float32."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hetcomp.errors import HetcompError
from hetcomp.frontend.source import ModelSource, resolve
from hetcomp.ir.annotations import DeferralQuality
from hetcomp.ir.deferral import LayerChoices
from hetcomp.models_zoo import evaluation_texts
from hetcomp.progress import ProgressSink, QuietProgress
from hetcomp.text_windows import spread_windows, token_ids

# By default: enough that the mean KL has a relative standard error of some percent, few enough that a large model takes
# minutes.
TOKENS = 2048
_ROUGH = 8  # part of them by which candidates are compared
_ROWS = 64  # of logits that are compared at a time: a vocabulary of 150k is 77 MB in float64


class DeferralOnText:
    """A :class:`hetcomp.ir.target.DeferralMeasure` that loads the model when it is asked what it does not know yet.

    model: a Hugging Face folder with weights, or a zoo name; it is loaded whole, in float32. text: a UTF-8 file (None:
    the zoo's evaluation texts), of which ``tokens`` tokens are taken in windows of at most 512, an eighth of them for
    rough measures. Every token is treated as a generated one. Raises HetcompError if the model has no weights or no
    tokenizer, or the text cannot be read.
    """

    def __init__(
        self, model: str | Path, text: str | Path | None, progress: ProgressSink | None = None, tokens: int = TOKENS
    ) -> None:
        self._model, self._text, self._tokens = model, text, tokens
        self._progress = progress or QuietProgress()
        self._ids: list[list[int]] | None = None
        self._known: dict[tuple[int, tuple[LayerChoices, ...]], DeferralQuality] = {}

    def rough_kl(self, candidates: Sequence[Sequence[LayerChoices]]) -> Sequence[float]:
        """By candidate, on an eighth of the tokens."""
        tokens, network = self._tokens // _ROUGH, _Network(self._model)
        return [quality.kl for quality in self._qualities(candidates, tokens, network)]

    def most_within(
        self, candidates: Sequence[Sequence[LayerChoices]], max_kl: float
    ) -> tuple[int, DeferralQuality] | None:
        """The last of all is tried first, then halves."""
        network = _Network(self._model)
        first, last, found = 0, len(candidates) - 1, None
        number = last
        while first <= last:
            quality = self._qualities([candidates[number]], self._tokens, network)[0]
            if quality.kl <= max_kl:
                first, found = number + 1, (number, quality)
            else:
                last = number - 1
            number = (first + last) // 2
        return found

    def _qualities(
        self, candidates: Sequence[Sequence[LayerChoices]], tokens: int, network: _Network
    ) -> list[DeferralQuality]:
        wanted = [(tokens, tuple(layers)) for layers in candidates]
        new = [key for key in dict.fromkeys(wanted) if key not in self._known]
        if new:
            windows = spread_windows(self._texts(network.source), tokens)
            name = "the zoo's evaluation texts" if self._text is None else Path(self._text).name
            total = sum(map(len, windows))
            self._progress.stage(f"measure deferral on {total} tokens", total=total * (1 + len(new)))
            layers = [layers for _, layers in new]
            self._known |= zip(new, compare(network.loaded, windows, layers, name, self._progress), strict=True)
        return [self._known[key] for key in wanted]

    def _texts(self, source: ModelSource) -> list[list[int]]:
        if self._ids is None:
            files = evaluation_texts() if self._text is None else [Path(self._text)]
            self._ids = [token_ids(source, file) for file in files]
        return self._ids


class _Network:
    """The model of transformers, loaded when it is needed and kept no longer than this."""

    def __init__(self, model: str | Path) -> None:
        self.source = resolve(model)
        self.source.refuse_quantised("measuring deferral")

    @functools.cached_property
    def loaded(self) -> nn.Module:
        transformers.logging.disable_progress_bar()  # there is one already
        found: nn.Module = self.source.model_class.from_pretrained(
            self.source.folder, dtype=torch.float32, experts_implementation="eager"
        )
        return found.eval()


@torch.inference_mode()
def compare(
    network: nn.Module,
    windows: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[LayerChoices]],
    text: str,
    progress: ProgressSink,
    *,
    skip: bool = False,
) -> tuple[DeferralQuality, ...]:
    """The quality of ``network`` on windows of token ids with each candidate; ``skip``: deferred choices are left out
    altogether. ``text`` names what was read."""
    sums = [[0.0, 0.0, 0.0] for _ in candidates]  # KL, loss, loss without
    predicted = sum(len(ids) - 1 for ids in windows)
    for ids in windows:
        tokens = torch.tensor([list(ids)])
        base = _logits(network, tokens)
        progress.advance(len(ids))
        for layers, total in zip(candidates, sums, strict=True):
            with deferring(network, layers, skip=skip):
                changed = _logits(network, tokens)
            for i, value in enumerate(_differences(base, changed, tokens[0, 1:])):
                total[i] += value
            progress.advance(len(ids))
    return tuple(
        DeferralQuality(text, predicted, kl / predicted, math.exp(loss / predicted), math.exp(before / predicted))
        for kl, loss, before in sums
    )


def _logits(network: nn.Module, tokens: Tensor) -> Tensor:
    found: Tensor = network(tokens, use_cache=False).logits[0, :-1]
    return found


def _differences(base: Tensor, changed: Tensor, targets: Tensor) -> tuple[float, float, float]:
    """Sums over the rows: KL divergence, loss with the change, and without."""
    kl = loss = before = 0.0
    for start in range(0, len(targets), _ROWS):
        p, q = (part[start : start + _ROWS].double().log_softmax(-1) for part in (base, changed))
        kl += float((p.exp() * (p - q)).sum())
        chosen = targets[start : start + _ROWS, None]
        loss -= float(q.gather(1, chosen).sum())
        before -= float(p.gather(1, chosen).sum())
    return kl, loss, before


@contextlib.contextmanager
def deferring(network: nn.Module, layers: Sequence[LayerChoices], *, skip: bool = False) -> Iterator[None]:
    """Within, the experts of ``network`` defer what ``layers`` says of each MoE layer, for every token; ``skip``: what
    is deferred is never added. Raises HetcompError if the network has another number of MoE layers."""
    experts = [m for m in network.modules() if hasattr(type(m), "_apply_gate") and hasattr(m, "down_proj")]
    if len(experts) != len(layers):
        raise HetcompError(
            f"{type(network).__name__} has {len(experts)} MoE layers in transformers, the plan has {len(layers)}; "
            "give --defer a number instead of auto."
        )
    left: list[Tensor] = []  # what the layer before has deferred
    for module, layer in zip(experts, layers, strict=True):
        module.forward = _forward(module.forward, layer, left, skip)
    try:
        yield
    finally:
        for module in experts:
            del module.forward  # the class's own


def _forward(whole: Callable[..., Any], layer: LayerChoices, left: list[Tensor], skip: bool) -> Callable[..., Any]:
    def forward(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        later = deferred_choices(ids, weights, layer)
        total: Tensor = whole(hidden, ids, weights.masked_fill(later, 0.0))
        while left:
            total = total + left.pop()
        if layer.deferred and not skip:
            left.append(whole(hidden, ids, weights.masked_fill(~later, 0.0)))
        return total

    return forward


def deferred_choices(ids: Tensor, weights: Tensor, layer: LayerChoices) -> Tensor:
    """Which choices of each token are deferred, bool [T, k]: of those of experts on the CPU the smallest weights, of
    equal ones the later choice first."""
    here = torch.tensor(layer.on_cpu)[ids]
    # Backwards, so that a stable sort puts the later of equal weights first.
    order = weights.masked_fill(~here, torch.inf).flip(-1).argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(ids.shape[-1]).expand_as(order)).flip(-1)
    return here & (rank < layer.deferred)
