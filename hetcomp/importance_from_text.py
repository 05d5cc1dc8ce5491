"""Makes an importance file (hetcomp.backends.importance) by running a model of transformers on text.

The importance of a column is the mean square of the activations that it meets: what the expected squared error of a
matrix's output weighs that column's error with, if activations of different columns are taken to be uncorrelated.
"""

from __future__ import annotations

import bisect
import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import torch
import transformers
from torch.overrides import TorchFunctionMode

from hetcomp import frontend
from hetcomp.backends.importance import MOMENTS
from hetcomp.errors import HetcompError
from hetcomp.frontend.source import resolve
from hetcomp.ir.plan import ValueKind
from hetcomp.progress import ProgressSink, QuietProgress
from hetcomp.text_windows import WINDOW, all_windows, token_ids

# So many tokens with the mean over all experts are added to what an expert saw itself: a mean square of n normal
# numbers has a relative standard error of sqrt(2 / n), here 9 %, and fewer than K tokens leave second moments singular.
SHARED_TOKENS = 256

_Floats = npt.NDArray[np.float32]


def importance_from_text(
    model: str | Path,
    text: str | Path | Sequence[Sequence[int]],
    out: Path,
    *,
    second_moments: bool = False,
    progress: ProgressSink | None = None,
) -> None:
    """Writes the importance of every matrix that ``model`` multiplies activations with while it reads ``text``.

    model: a Hugging Face folder with weights, or a zoo name; it is loaded whole, in float32 (in bf16 oneDNN
    generates code for every number of tokens that an expert gets, which takes longer than the arithmetic). text: a
    UTF-8 file, cut into windows of 512 tokens that are run one by one, or token ids of several texts. Matrices of
    experts get a row an expert, in which the mean over all experts counts as 256 tokens more. second_moments: write
    those too, which takes K times the memory and the disk, and more time.

    Raises HetcompError, with nothing left at ``out``, if the model has no weights or no tokenizer, or the text cannot
    be read or has fewer than two tokens.
    """
    progress = progress or QuietProgress()
    source = resolve(model)
    source.refuse_quantised("importance")
    windows = all_windows([token_ids(source, Path(text))] if isinstance(text, str | Path) else text)
    progress.stage("trace")
    wanted = _matrices(model)
    progress.stage("load")
    transformers.logging.disable_progress_bar()  # there is one already
    network = source.model_class.from_pretrained(
        source.folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    progress.stage("run on text", total=sum(map(len, windows)))
    watch = _Watch(network, wanted, second_moments)
    limit = source.config.vocab_size
    for ids in windows:
        if max(ids) >= limit or min(ids) < 0:
            raise HetcompError(f"The text has token {max(ids)}, but {source.name} has a vocabulary of {limit}.")
        with torch.inference_mode(), watch:
            network(torch.tensor([ids]), use_cache=False)
        progress.advance(len(ids))
    vectors: dict[str, _Floats] = {}
    for name in list(watch.seen):
        seen = watch.seen.pop(name)  # its memory is free when the next one's means are made
        vectors[name] = seen.mean(seen.squares)
        if seen.products is not None:
            vectors[name + MOMENTS] = seen.mean(seen.products)
    _write(vectors, out)


def _matrices(model: str | Path) -> set[str]:
    """Names of the weights whose columns importance can be given for."""
    imported = frontend.load(model, context_length=None, max_batch=1, max_tokens=WINDOW, max_logit_rows=1)
    if imported.checkpoint is None:
        raise HetcompError(f"{imported.plan.model.name} is a config without weights; importance needs a model to run.")
    return {
        v.fqn
        for v in imported.plan.values
        if v.kind is ValueKind.WEIGHT and v.fqn and len(v.type.shape) > 1 and not (v.view and v.view.head_transpose)
    }


@dataclass
class _Seen:
    """Sums of squares [E, K], of products [E, K, K] if wanted, and the number of tokens [E] of each expert; E is 1 for
    a plain matrix."""

    of_experts: bool
    squares: torch.Tensor
    products: torch.Tensor | None
    tokens: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = torch.zeros(len(self.squares), dtype=torch.int64)

    def add(self, expert: int, activations: torch.Tensor) -> None:
        rows = activations.reshape(-1, activations.shape[-1])
        self.squares[expert] += rows.square().sum(0)
        if self.products is not None:
            self.products[expert] += rows.T @ rows
        self.tokens[expert] += len(rows)

    def mean(self, sums: torch.Tensor) -> _Floats:
        shared = sums.sum(0) / self.tokens.sum().clamp(min=1)
        if self.of_experts:
            tokens = self.tokens.reshape(-1, *[1] * shared.ndim)
            shared = (sums + SHARED_TOKENS * shared) / (tokens + SHARED_TOKENS)
        result: _Floats = shared.contiguous().numpy()
        return result


class _Watch(TorchFunctionMode):
    """While active, adds up the squares of what is multiplied with the wanted parameters, or with one expert's slice of
    them, by torch.nn.functional.linear."""

    def __init__(self, network: torch.nn.Module, wanted: set[str], products: bool) -> None:
        super().__init__()
        self._products = products
        parameters = [(p.data_ptr(), name, p) for name, p in network.named_parameters() if name in wanted]
        self._parameters = sorted(parameters, key=lambda entry: entry[0])
        self._starts = [start for start, _, _ in self._parameters]
        self.seen: dict[str, _Seen] = {}

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401 - as torch declares it
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        if func is torch.nn.functional.linear:
            self._linear(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _linear(self, activations: torch.Tensor, weight: torch.Tensor) -> None:
        i = bisect.bisect_right(self._starts, weight.data_ptr()) - 1
        if i < 0:
            return
        start, name, parameter = self._parameters[i]
        offset = (weight.data_ptr() - start) // parameter.element_size()
        if offset >= parameter.numel() or not weight.is_contiguous() or weight.shape[-1] != parameter.shape[-1]:
            return
        of_experts = parameter.ndim == 3
        if name not in self.seen:
            size = (parameter.shape[0] if of_experts else 1, parameter.shape[-1])
            products = torch.zeros(*size, size[-1]) if self._products else None
            self.seen[name] = _Seen(of_experts, torch.zeros(size), products)
        expert = offset // math.prod(parameter.shape[1:]) if of_experts else 0
        self.seen[name].add(expert, activations)


def _write(vectors: dict[str, _Floats], out: Path) -> None:
    with _appearing(out) as partial:
        safetensors.numpy.save_file(vectors, partial)


@contextlib.contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A file beside ``out`` that takes its place when the block ends well, and is gone otherwise."""
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(out)
    except (OSError, safetensors.SafetensorError) as error:
        raise HetcompError(f"{out} cannot be written: {error}.") from None
    finally:
        partial.unlink(missing_ok=True)
