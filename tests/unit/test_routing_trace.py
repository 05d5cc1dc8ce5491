"""Files of routing traces: what is written is read; what is damaged is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hetcomp.errors import HetcompError
from hetcomp.routing_trace import FORMAT, RoutedStep, RoutingTrace

LAYERS, TOP_K, EXPERTS = 3, 2, 8
METADATA = {"format": FORMAT, "model": "tiny", "experts": str(EXPERTS), "source": "law.txt"}


def step(positions: list[int], slots: list[int], *, decode: bool = False, seed: int = 0) -> RoutedStep:
    generator = np.random.default_rng(seed)
    shape = (LAYERS, len(positions))
    experts = np.array([[generator.permutation(EXPERTS)[:TOP_K] for _ in range(shape[1])] for _ in range(LAYERS)])
    weights = generator.random((*shape, TOP_K)).astype(np.float32)
    as_i32 = [np.array(x, np.int32) for x in (positions, slots)]
    return RoutedStep(decode, *as_i32, experts.astype(np.int32), weights)


def trace() -> RoutingTrace:
    steps = [step([0, 1, 2], [0, 0, 0]), step([3], [0], decode=True, seed=1), step([0], [0], seed=2)]
    return RoutingTrace.of_steps("tiny", "law.txt", EXPERTS, steps)


def test_what_is_written_is_read(tmp_path):
    made = trace()
    made.write(tmp_path / "t")
    read = RoutingTrace.read(tmp_path / "t")
    assert (read.model, read.source, read.n_experts) == ("tiny", "law.txt", EXPERTS)
    assert (read.tokens, read.layers, read.top_k) == (5, LAYERS, TOP_K)
    for name in ("experts", "weights", "step", "decode", "position", "sequence"):
        np.testing.assert_array_equal(getattr(read, name), getattr(made, name))
    assert read.experts.dtype == np.uint8
    assert read.step.tolist() == [0, 0, 0, 1, 2] and read.decode.tolist() == [0, 0, 0, 1, 0]
    assert read.sequence.tolist() == [0, 0, 0, 0, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_of_more_experts_than_a_byte_counts(tmp_path):
    made = trace()
    wide = replace(made, n_experts=512, experts=(made.experts.astype(np.uint16) + 300))
    wide.write(tmp_path / "t")
    np.testing.assert_array_equal(RoutingTrace.read(tmp_path / "t").experts, wide.experts)


def test_a_run_without_steps_or_of_different_layers_gives_no_trace():
    with pytest.raises(HetcompError, match="no step"):
        RoutingTrace.of_steps("tiny", "x", EXPERTS, [])
    other = step([0], [0])
    other = replace(other, experts=other.experts[:2], weights=other.weights[:2])
    with pytest.raises(HetcompError, match="differ in shape"):
        RoutingTrace.of_steps("tiny", "x", EXPERTS, [step([0], [0]), other])


def damaged(
    change: Callable[[dict[str, Any]], object], metadata: dict[str, str] | None = None
) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        trace().write(path)
        arrays = load_file(path)
        change(arrays)
        save_file(arrays, path, METADATA if metadata is None else metadata)

    return write


def nothing(_arrays: dict[str, Any]) -> None:
    pass


def put(name: str, at: tuple[int, ...], value: float) -> Callable[[dict[str, Any]], None]:
    return lambda arrays: arrays[name].__setitem__(at, value)


DAMAGES = {
    "format": (damaged(nothing, {}), "no routing trace: its format is None"),
    "newer": (damaged(nothing, {**METADATA, "format": "hetcomp routing trace 2"}), "no routing trace"),
    "number": (damaged(nothing, {**METADATA, "experts": "many"}), "trace is of 'many' experts"),
    "lacks": (damaged(lambda a: a.pop("step")), "lacks the array step"),
    "dtype": (damaged(lambda a: a.update(step=a["step"].astype(np.int64))), "step is I64"),
    "shape": (damaged(lambda a: a.update(step=a["step"][:2])), "step has 2 entries for 5 tokens"),
    "weights": (damaged(lambda a: a.update(weights=a["weights"][:, :2])), r"weights is \[5, 2, 2\], experts"),
    "range": (damaged(put("experts", (1, 1, 1), EXPERTS)), "expert 8 was chosen, but a layer has 8"),
    "finite": (damaged(put("weights", (1, 1, 1), float("nan"))), "not finite"),
    "falls": (damaged(put("step", (4,), 0)), "the numbers of the steps fall"),
    "empty": (damaged(lambda a: a.update({n: v[:0] for n, v in a.items()})), "experts is of 0 tokens"),
    "json": (lambda path: path.write_bytes((8).to_bytes(8, "little") + b"not json"), "not valid JSON"),
    "short": (lambda path: path.write_bytes(b"abc"), "truncated or no safetensors file"),
    "absent": (lambda path: None, "cannot read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_by_name(tmp_path, damage):
    write, message = DAMAGES[damage]
    path = tmp_path / "trace.safetensors"
    write(path)
    with pytest.raises(HetcompError, match=message) as refused:
        RoutingTrace.read(path)
    assert "trace.safetensors" in str(refused.value)


def test_a_cut_file_is_refused(tmp_path):
    path = tmp_path / "trace.safetensors"
    trace().write(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(HetcompError, match="truncated"):
        RoutingTrace.read(path)


def test_a_choice_that_is_made_twice_is_refused(tmp_path):
    path = tmp_path / "trace.safetensors"
    made = trace()
    twice = made.experts.copy()
    twice[0, 0, 1] = twice[0, 0, 0]
    replace(made, experts=twice).write(path)
    with pytest.raises(HetcompError, match="chooses an expert twice"):
        RoutingTrace.read(path)
