"""Rows, columns and numbers that llama.cpp stores otherwise than transformers, by the rules of its converter
(conversion/qwen.py: Qwen3NextModel, _LinearAttentionVReorderBase; LlamaModel.permute)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hetcomp.errors import HetcompError
from hetcomp.frontend.gguf.tensor_names import PERMUTED, TILED, ZERO_CENTRED
from hetcomp.quantised_numbers import QuantisedNumbers

_Raw = npt.NDArray[Any]
_Order = npt.NDArray[np.int64]
Numbers = _Raw | QuantisedNumbers


@dataclass(frozen=True)
class StoredOrders:
    """Of one model, by the end of a tensor's name (``attn_q.weight``). ``rows``: transformers' row i is the file's
    row order[i], likewise ``columns`` in runs of ``run`` columns. ``restored``: what makes the numbers of what is
    stored."""

    rows: Mapping[str, _Order] = field(default_factory=dict)
    columns: Mapping[str, _Order] = field(default_factory=dict)
    run: int = 1
    restored: Mapping[str, Callable[[_Raw, str], _Raw]] = field(default_factory=dict)

    @staticmethod
    def of(config: Mapping[str, Any]) -> StoredOrders:
        """Those of the model with this config."""
        kind = config["model_type"]
        rows: dict[str, _Order] = {}
        columns: dict[str, _Order] = {}
        run = 1
        if kind in PERMUTED:
            dims = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
            rows["attn_q.weight"] = rows["attn_q.bias"] = _in_halves(config["num_attention_heads"], dims)
            rows["attn_k.weight"] = rows["attn_k.bias"] = _in_halves(config["num_key_value_heads"], dims)
        if kind in TILED and config["linear_num_key_heads"] != config["linear_num_value_heads"]:
            rows |= _tiled_rows(config)
            run = config["linear_value_head_dim"]
            columns["ssm_out.weight"] = _tiled(config)
        restored: dict[str, Callable[[_Raw, str], _Raw]] = {}
        if kind in ZERO_CENTRED:
            restored["ssm_a"] = _logarithm
            for name in ("attn_norm", "post_attention_norm", "attn_q_norm", "attn_k_norm", "output_norm"):
                restored[f"{name}.weight"] = _less_one
        return StoredOrders(rows, columns, run, restored)

    def apply(self, numbers: Numbers, tensor: str) -> Numbers:
        """Numbers of the tensor called so as transformers has them; f32 where columns of another order cut blocks."""
        end = _end(tensor)
        if end in self.rows:
            numbers = _take_rows(numbers, self.rows[end])
        if end in self.columns:
            runs = [(int(i) * self.run, (int(i) + 1) * self.run) for i in self.columns[end]]
            if isinstance(numbers, QuantisedNumbers):
                return numbers.cut(-1, runs)
            return np.concatenate([numbers[..., start:stop] for start, stop in runs], axis=-1)
        if end in self.restored:
            assert not isinstance(numbers, QuantisedNumbers)
            return self.restored[end](numbers, tensor)
        return numbers

    def changes(self, tensor: str) -> bool:
        """Whether :meth:`apply` does anything to it."""
        end = _end(tensor)
        return end in self.rows or end in self.columns or end in self.restored

    def row_places(self, places: _Raw, tensor: str) -> _Raw | str:
        """Places of a tensor's rows in the order of transformers; or why they are of no use."""
        end = _end(tensor)
        if end in self.columns:
            return "its columns are stored in another order"
        if end in self.restored:
            return "its numbers are computed from what is stored"
        return places[self.rows[end]] if end in self.rows else places

    def cuts(self, tensor: str, block: int) -> bool:
        """Whether columns in another order cut blocks of so many."""
        return _end(tensor) in self.columns and self.run % block != 0


def _end(tensor: str) -> str:
    return tensor.split(".", 2)[2] if tensor.startswith("blk.") else tensor


def _take_rows(numbers: Numbers, order: _Order) -> Numbers:
    return numbers.rows(order) if isinstance(numbers, QuantisedNumbers) else numbers[order]


def _in_halves(heads: int, head_dim: int) -> _Order:
    """The halves of each head one behind the other, out of llama.cpp's order: a row of each half in turn."""
    order: _Order = np.arange(heads * head_dim).reshape(heads, -1, 2).swapaxes(1, 2).ravel()
    return order


def _tiled(config: Mapping[str, Any]) -> _Order:
    """The value heads of each key head one behind the other, out of llama.cpp's order: one of each key head in turn."""
    heads, keys = config["linear_num_value_heads"], config["linear_num_key_heads"]
    order: _Order = np.arange(heads).reshape(-1, keys).T.ravel()
    return order


def _tiled_rows(config: Mapping[str, Any]) -> dict[str, _Order]:
    heads, dims = _tiled(config), config["linear_value_head_dim"]
    keys = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values = (heads[:, None] * dims + np.arange(dims)).ravel()
    behind_keys = np.concatenate([np.arange(keys), keys + values])
    return {
        "attn_qkv.weight": behind_keys,
        "ssm_conv1d.weight": behind_keys,
        "attn_gate.weight": values,
    } | dict.fromkeys(("ssm_alpha.weight", "ssm_beta.weight", "ssm_a", "ssm_dt.bias"), heads)


def _less_one(numbers: _Raw, tensor: str) -> _Raw:
    """Zero-centred norms are stored with the 1 added. Adding it again gives what is stored, to half a unit in the last
    place of 1."""
    return numbers.astype(np.float32) - np.float32(1)


def _logarithm(numbers: _Raw, tensor: str) -> _Raw:
    """A_log out of -exp(A_log). In float64 and rounded once, it is off by at most 2^-24 of its size a, and exp(A_log)
    by 2^-24 |a|: some units in the last place, as exp in f32 is itself (models have a between -7 and 3)."""
    stored = numbers.astype(np.float64)
    if not (stored < 0).all():
        raise HetcompError(f"{tensor} has numbers that are not negative; it stands for -exp(A_log)")
    logs: _Raw = np.log(-stored).astype(np.float32)
    return logs
