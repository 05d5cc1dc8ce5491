"""A compiled model that can be run from Python."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetcomp.artifact.staging import staged_folder
from hetcomp.errors import HetcompError
from hetcomp.ir.plan import Plan
from hetcomp.ir.serialise import read_plan
from hetcomp.runtime import Runtime, Token


class Executable:
    """An artifact loaded into this process. Made by :func:`hetcomp.compile` and :func:`hetcomp.load`."""

    def __init__(
        self,
        path: Path,
        *,
        owner: tempfile.TemporaryDirectory[str] | None = None,
        threads: int = 0,
        weights: str = "auto",
        gpus: Sequence[int] = (),
    ) -> None:
        self.path = path
        self._owner = owner  # keeps an artifact without a name alive
        self._packed: tempfile.TemporaryDirectory[str] | None = None  # adapters that were given as folders
        self._threads = threads
        self._weights = weights
        self._gpus = gpus

    @cached_property
    def runtime(self) -> Runtime:
        """The loaded runtime; weights are read on first use."""
        return Runtime.load(self.path, threads=self._threads, weights=self._weights, gpus=self._gpus)

    @cached_property
    def plan(self) -> Plan:
        """The Plan that this executable was generated from, with its predicted timelines."""
        return read_plan(self.path / "plan.json")

    @property
    def stats(self) -> dict[str, Any]:
        """Measured figures of this process: tokens, seconds and tokens/s per phase, time per role, memory."""
        return self.runtime.stats()

    def count_experts(self, half_life: int = 0) -> None:
        """Counts from the next step on how often each expert is chosen, by all tokens and by those of each session; a
        choice counts half of a new one once ``half_life`` more tokens were counted (0: as much, always). Raises
        HetcompError for a model without MoE layers, or with some whose experts are all on a GPU."""
        from hetcomp.record_routing import recordable

        recordable(self.plan)
        self.runtime.count_experts(half_life)

    def expert_statistics(self) -> str:
        """What was counted, or since the figures were set to zero: the text of a file that ``hetcomp plan --stats``
        reads; a session has its own (:meth:`Session.expert_statistics`). Raises HetcompError if nothing was."""
        return self.runtime.expert_statistics()

    def load_adapter(self, path: str | Path, name: str | None = None, *, allow_router: bool = False) -> str:
        """Makes a LoRA adapter available to :meth:`__call__` and :meth:`generate` while requests run; returns its name.

        path: a PEFT folder, which is packed for this artifact (``hetcomp adapter pack`` does it once for all), or a
        packed file. ``name``: the folder's or file's by default. Raises HetcompError if the adapter is refused.
        """
        path = Path(path)
        name = name or (path.resolve().name if path.is_dir() else path.stem)
        if path.is_dir():
            from hetcomp.adapters.pack_adapter import pack_adapter

            if self._packed is None:
                self._packed = tempfile.TemporaryDirectory(prefix="hetcomp-adapters-")
            file = Path(tempfile.mkdtemp(dir=self._packed.name)) / f"{path.name}.hetlora"
            path = pack_adapter(self.path, path, file, name=name, allow_router=allow_router).path
        self.runtime.load_adapter(path, name)
        return name

    def unload_adapter(self, name: str) -> None:
        """Forgets an adapter. Raises HetcompError while a request uses it."""
        self.runtime.unload_adapter(name)

    def __call__(
        self, ids: Sequence[int] | NDArray[np.integer[Any]], *, adapter: str | None = None
    ) -> NDArray[np.float32]:
        """Logits of every position of a sequence, with an adapter that was loaded, or without.

        ids: T token ids (0 .. vocab - 1), T <= context. Returns float32 [T, vocab].
        Raises HetcompError if an id or the length is out of range, or there is no such adapter.
        """
        return self.runtime.forward(ids, adapter=adapter)

    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        repetition_penalty: float = 1.0,
        adapter: str | None = None,
    ) -> Iterator[Token]:
        """Generates tokens one by one, with an adapter that was loaded, or without.

        prompt: text, or token ids. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off. Ends after
        ``max_new_tokens``, at an end-of-sequence token (unless ``ignore_eos``), before a ``stop`` string, or when
        the context is full. Yields tokens with ``.id`` and ``.text`` (the complete characters that this token
        finished). Raises HetcompError for a prompt that does not fit or a model without tokenizer.
        """
        ids = self.runtime.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        return self.runtime.generate(
            ids,
            adapter=adapter,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            ignore_eos=ignore_eos,
        )

    def save(self, path: str | Path) -> Path:
        """Copies the artifact to ``path`` (whole or not at all) and returns it."""
        target = Path(path)
        if target.absolute() == self.path.absolute():
            return target
        with staged_folder(target) as staging:
            shutil.copytree(self.path, staging, dirs_exist_ok=True)
        return target


def load(path: str | Path, *, threads: int = 0, weights: str = "auto", gpus: Sequence[int] = ()) -> Executable:
    """Loads an artifact.

    threads: CPU threads, 0 for as many as this process may use. weights: ``ram`` (huge pages), ``mmap`` or
    ``auto``. gpus: for an artifact compiled for GPUs, a number for each of them as the driver counts; by default its
    ``gpu:0`` is number 0. Raises HetcompError if the artifact is missing, damaged, of a newer schema, or needs an
    instruction set or a GPU that this machine lacks.
    """
    folder = Path(path)
    if not (folder / "manifest.json").is_file():
        raise HetcompError(f"{folder} is not a hetcomp artifact: it has no manifest.json. Compile a model first.")
    exe = Executable(folder, threads=threads, weights=weights, gpus=gpus)
    _ = exe.runtime
    return exe
