"""The facts of one model in GGUF metadata, by keys without the architecture in front, and what its tensors tell."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from hetcomp.errors import HetcompError
from hetcomp.frontend.gguf.header import Fact, shown
from hetcomp.frontend.gguf.model_files import ModelFiles
from hetcomp.ir.plan import CheckpointTensor

_Scalar = TypeVar("_Scalar", int, float, str, bool)


@dataclass(frozen=True)
class ModelFacts:
    """Of ``files``. What is asked for raises HetcompError, naming it, if it has another type, is out of bounds, or is
    needed and missing."""

    files: ModelFiles

    def get(self, key: str, kind: type[_Scalar]) -> _Scalar | None:
        return self.files.get(f"{self.files.architecture}.{key}", kind)

    def need(self, key: str, kind: type[_Scalar]) -> _Scalar:
        return self.files.need(f"{self.files.architecture}.{key}", kind)

    def whole(self, key: str, default: int) -> int:
        found = self.get(key, int)
        return default if found is None else found

    def tensor(self, name: str) -> CheckpointTensor:
        if name not in self.files.tensors:
            raise HetcompError(f"{self.files.path} has no tensor {name}")
        return self.files.tensors[name]

    def has(self, name: str) -> bool:
        return name in self.files.tensors

    def columns(self, name: str) -> int:
        """Of the first layer's tensor that is called so."""
        for layer in range(self.layers):
            if self.has(f"blk.{layer}.{name}"):
                return self.tensor(f"blk.{layer}.{name}").shape[-1]
        raise HetcompError(f"{self.files.path} has no tensor blk.*.{name}")

    @property
    def layers(self) -> int:
        """Without those that only predict further tokens, which lie behind the others."""
        found = self.need("block_count", int) - self.whole("nextn_predict_layers", 0)
        if not 1 <= found <= len(self.files.tensors):
            raise self.refuse("block_count", found, "at least one layer, and no more than there are tensors")
        return found

    def width(self, key: str, default: int | None = None) -> int:
        """A number of rows, columns, heads or experts: some tensor has an axis of that length, or a longer one."""
        found = self.need(key, int) if default is None else self.whole(key, default)
        if not 1 <= found <= self._widest:
            raise self.refuse(key, found, f"1 to {self._widest}, the length of the longest axis of a tensor")
        return found

    @cached_property
    def _widest(self) -> int:
        return max((max(t.shape) for t in self.files.tensors.values()), default=0)

    @property
    def heads(self) -> int:
        return self.width("attention.head_count")

    @property
    def used_experts(self) -> int:
        """By each token."""
        found, experts = self.width("expert_used_count"), self.width("expert_count")
        if found > experts:
            raise self.refuse("expert_used_count", found, f"at most the {experts} experts")
        return found

    @property
    def head_dim(self) -> int:
        found = self.width("attention.key_length", max(1, self.width("embedding_length") // self.heads))
        rows = self.tensor("blk.0.attn_q.weight").shape[0]
        if found * self.heads != rows:
            raise self.refuse("attention.key_length", found, f"the {rows} rows of attn_q by {self.heads} heads")
        return found

    def rotary(self, head_dim: int, default: int) -> int:
        """Of a head's numbers those that are rotated, in pairs."""
        found = self.width("rope.dimension_count", default)
        if found > head_dim or found % 2:
            raise self.refuse("rope.dimension_count", found, f"an even number up to {head_dim}")
        return found

    def refuse(self, key: str, found: Fact | None, expected: str) -> HetcompError:
        return HetcompError(
            f"{self.files.path}: {self.files.architecture}.{key} is {shown(found)}; expected {expected}"
        )
