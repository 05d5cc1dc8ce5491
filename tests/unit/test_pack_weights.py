"""From a checkpoint to packed files: every byte in its place, importance where it belongs, memory bounded."""

from __future__ import annotations

import threading
import weakref
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hetcomp.artifact.weight_files import write_weights
from hetcomp.backends import packing
from hetcomp.backends.error_feedback import pack_with_feedback
from hetcomp.backends.importance import MOMENTS, Importance
from hetcomp.backends.pack_weights import WeightPacker
from hetcomp.errors import HetcompError
from hetcomp.ir.plan import Value, ValueKind, WeightSource
from hetcomp.ir.types import DType, TensorType

EXPERTS, ROWS, COLUMNS = 5, 34, 70


def _weight(name: str, shape: tuple[int, ...], weight_format: str | None, layout: str, view=None) -> Value:
    kind = ValueKind.WEIGHT
    return Value(name, TensorType(DType.F32, shape, layout), kind, fqn=f"m.{name}", format=weight_format, view=view)


VALUES = (
    _weight("table", (100, COLUMNS), "q8", packing.PANELS),
    _weight("norm", (COLUMNS,), "f32", packing.ROW_MAJOR),
    _weight("experts", (EXPERTS, ROWS, COLUMNS), "q4", packing.PANELS_GLU),
    _weight("out", (ROWS, COLUMNS), "q4", packing.PANELS),
)


class _Reader:
    """Counts the arrays that are alive."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.numbers = {v.id: rng.standard_normal(v.type.shape).astype(np.float32) for v in VALUES}
        self.alive = self.most = 0

    def _handed_out(self, numbers: np.ndarray) -> np.ndarray:
        copy = numbers.copy()
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(copy, self._dropped)
        return copy

    def _dropped(self) -> None:
        self.alive -= 1

    def read(self, value: Value) -> np.ndarray:
        return self._handed_out(self.numbers[value.id])

    def read_expert(self, value: Value, expert: int) -> np.ndarray:
        return self._handed_out(self.numbers[value.id][expert])


def _written(tmp_path: Path, reader: _Reader, importance: Importance | None = None) -> dict[str, np.ndarray]:
    sizes = [packing.packed_bytes(v) for v in VALUES]
    advanced: list[int] = []
    records = write_weights(
        VALUES,
        sizes,
        WeightPacker(reader, importance).chunks(VALUES),
        tmp_path,
        lambda n, _: advanced.append(n),
        shard_bytes=20_000,
    )
    assert sum(advanced) == sum(sizes) and len(advanced) == EXPERTS + 3
    assert len({r.file for r in records}) > 1
    return {
        v.id: np.fromfile(tmp_path / r.file, np.uint8, r.bytes, offset=r.offset)
        for v, r in zip(VALUES, records, strict=True)
    }


def test_files_hold_what_packing_gives_and_few_matrices_are_alive(tmp_path):
    reader = _Reader()
    files = _written(tmp_path, reader)
    for value in VALUES:
        np.testing.assert_array_equal(files[value.id], packing.pack(reader.numbers[value.id], value)[0])
    assert reader.most <= 3


def test_importance_guides_the_weights_it_names(tmp_path):
    rng = np.random.default_rng(1)
    vectors = {
        "m.experts": rng.exponential(size=(EXPERTS, COLUMNS)).astype(np.float32),
        "m.out": rng.exponential(size=COLUMNS).astype(np.float32),
    }
    path = tmp_path / "importance.safetensors"
    save_file(vectors, path)
    reader = _Reader()
    files = _written(tmp_path, reader, Importance.load(path, VALUES))
    for value in VALUES:
        want, _ = packing.pack(reader.numbers[value.id], value, importance=vectors.get(f"m.{value.id}"))
        np.testing.assert_array_equal(files[value.id], want)
    assert not np.array_equal(files["out"], packing.pack(reader.numbers["out"], VALUES[3])[0])


def test_second_moments_make_errors_fed_back(tmp_path):
    """In q4 only, an expert with its own."""
    causes = np.random.default_rng(2).standard_normal((EXPERTS, COLUMNS, 2 * COLUMNS))
    each = (causes @ causes.swapaxes(1, 2)).astype(np.float32)
    moments = {"m.experts": each, "m.out": each[0], "m.table": each[1]}
    path = tmp_path / "importance.safetensors"
    save_file({f"{name}{MOMENTS}": numbers for name, numbers in moments.items()}, path)
    reader = _Reader()
    files = _written(tmp_path, reader, Importance.load(path, VALUES))
    table, _, experts, out = VALUES
    np.testing.assert_array_equal(files["table"], packing.pack(reader.numbers["table"], table)[0])
    np.testing.assert_array_equal(files["out"], pack_with_feedback(reader.numbers["out"], out, each[0])[0])
    want = [pack_with_feedback(reader.numbers["experts"][e], experts, each[e])[0] for e in range(EXPERTS)]
    np.testing.assert_array_equal(files["experts"], np.concatenate(want))
    assert not np.array_equal(files["out"], packing.pack(reader.numbers["out"], out)[0])


@pytest.mark.parametrize(
    ("name", "vector", "sentence"),
    [
        ("m.nowhere", np.ones(COLUMNS), "m.nowhere, which is no quantisable weight of this model"),
        ("m.norm", np.ones(COLUMNS), "m.norm, which is no quantisable weight of this model"),
        ("m.out", np.ones(3), r"m\.out has importance of shape \[3\], expected \[70\]"),
        ("m.experts", np.ones((4, COLUMNS)), r"of shape \[4, 70\], expected \[70\] or \[5, 70\]"),
        ("m.out", np.full(COLUMNS, -1.0), "m.out has negative, infinite or NaN"),
        ("m.out", np.full(COLUMNS, np.nan), "m.out has negative, infinite or NaN"),
        ("m.out" + MOMENTS, np.ones(COLUMNS), r"of shape \[70\], expected \[70, 70\]"),
        ("m.nowhere" + MOMENTS, np.eye(COLUMNS), "m.nowhere, which is no quantisable weight"),
        ("m.out" + MOMENTS, -np.eye(COLUMNS), "m.out.second_moments has negative"),
    ],
)
def test_importance_for_another_model_is_refused(tmp_path, name, vector, sentence):
    path = tmp_path / "importance.safetensors"
    save_file({name: vector.astype(np.float32)}, path)
    with pytest.raises(HetcompError, match=sentence) as refusal:
        Importance.load(path, VALUES)
    assert str(path) in str(refusal.value)


def test_damaged_importance_files_are_refused(tmp_path):
    path = tmp_path / "importance.safetensors"
    with pytest.raises(HetcompError, match=r"importance\.safetensors cannot be read"):
        Importance.load(path, VALUES)
    path.write_bytes(b"no such format")
    with pytest.raises(HetcompError, match=r"importance\.safetensors cannot be read"):
        Importance.load(path, VALUES)


def test_importance_does_not_apply_to_transposed_parts():
    view = WeightSource("plain", (), head_split=(2, 0, 8), head_transpose=True)
    part = _weight("kv_b", (2, 64, 8), "q4", packing.PANELS, view)
    plain = _weight("kv_b", (2, 8, 64), "q4", packing.PANELS, WeightSource("plain", (), head_split=(2, 0, 8)))
    importance = Importance({"m.kv_b": np.ones(64, np.float32)}, (part, plain), "here")
    assert importance.of(part) is None
    assert importance.of(plain) is not None


def test_weights_with_numbers_that_are_not_finite_are_named_once():
    reader = _Reader()
    reader.numbers["experts"][1, 2, 3] = np.nan
    reader.numbers["experts"][4, 2, 3] = np.inf
    packer = WeightPacker(reader)
    assert len(list(packer.chunks(VALUES))) == EXPERTS + 3
    assert packer.not_finite == ["m.experts"]


def test_an_unreadable_checkpoint_ends_everything(tmp_path):
    class Broken(_Reader):
        def read_expert(self, value: Value, expert: int) -> np.ndarray:
            if expert == 2:
                raise HetcompError("shard 7 was truncated")
            return super().read_expert(value, expert)

    with pytest.raises(HetcompError, match="shard 7 was truncated"):
        _written(tmp_path, Broken())
    assert not [t for t in threading.enumerate() if t.name.startswith("hetcomp")]


def test_an_interrupt_leaves_no_thread_behind(tmp_path):
    def interrupted(_: int, __: str) -> None:
        raise KeyboardInterrupt

    sizes = [packing.packed_bytes(v) for v in VALUES]
    with pytest.raises(KeyboardInterrupt):
        write_weights(VALUES, sizes, WeightPacker(_Reader()).chunks(VALUES), tmp_path, interrupted)
    assert not [t for t in threading.enumerate() if t.name.startswith("hetcomp")]


def test_a_weight_of_another_size_than_planned_is_a_bug_report(tmp_path):
    sizes = [packing.packed_bytes(v) + 64 for v in VALUES]
    chunks = WeightPacker(_Reader()).chunks(VALUES)
    with closing(chunks), pytest.raises(HetcompError, match=r"m\.table does not pack to the plan's \d+ bytes"):
        write_weights(VALUES, sizes, chunks, tmp_path, lambda *_: None)
