"""Damaged artifacts, from Python and from the binary: the file is named, nothing crashes, no byte of it is
run.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import hetcomp
from hetcomp.errors import HetcompError
from tests.e2e.command_line import refusal

Damage = Callable[[Path], None]


def _binary_refusal(artifact: Path, binary: Path, *arguments: str) -> str:
    """What the C++ binary says to a damaged artifact: one line, an ordinary non-zero exit."""
    command = [str(binary), str(artifact), *(arguments or ("--ids", "1,2,3", "-n", "1"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert 0 < done.returncode < 126, f"exit {done.returncode}: {done.stderr}"
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def _refusals(artifact: Path, tiny_artifact: Path) -> list[str]:
    """The sentences of the three ways in: API, command line, binary (that of the undamaged artifact)."""
    with pytest.raises(HetcompError) as caught:
        hetcomp.load(artifact)
    return [
        str(caught.value),
        refusal("run", artifact, "--ids", "1,2,3", "-n", "1"),
        _binary_refusal(artifact, tiny_artifact / "bin" / "hetcomp-run"),
    ]


def _weights(artifact: Path) -> Path:
    return next(artifact.glob("weights-*.safetensors"))


def _program(artifact: Path) -> Path:
    return next((artifact / "kernels").glob("lib_*.so"))


def _truncate(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("which", ["weights", "program", "plan.json"])
def test_truncated_file(artifact, tiny_artifact, which, keep):
    path = {"weights": _weights, "program": _program}.get(which, lambda folder: folder / which)(artifact)
    _truncate(path, keep)
    for sentence in _refusals(artifact, tiny_artifact):
        assert path.name in sentence, sentence


@pytest.mark.parametrize("which", ["weights", "program", "plan.json"])
def test_missing_file(artifact, tiny_artifact, which):
    path = {"weights": _weights, "program": _program}.get(which, lambda folder: folder / which)(artifact)
    path.unlink()
    for sentence in _refusals(artifact, tiny_artifact):
        assert path.name in sentence, sentence


def test_bit_flip_in_a_weight_names_the_tensor(artifact, tiny_artifact, flip_bit):
    manifest = json.loads((artifact / "manifest.json").read_text())
    weight = manifest["weights"][len(manifest["weights"]) // 2]
    flip_bit(artifact / weight["file"], weight["offset"] + weight["bytes"] // 2)
    for sentence in _refusals(artifact, tiny_artifact):
        assert weight["name"] in sentence, sentence


def test_bit_flip_in_the_code_is_found_before_it_is_loaded(artifact, tiny_artifact, flip_bit):
    path = _program(artifact)
    flip_bit(path, path.stat().st_size // 2)
    for sentence in _refusals(artifact, tiny_artifact):
        assert path.name in sentence, sentence


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "x"}', '{"schema": [1, 0]}', "\x00\x01"])
def test_manifest_that_is_no_manifest(artifact, tiny_artifact, text):
    (artifact / "manifest.json").write_text(text)
    for sentence in _refusals(artifact, tiny_artifact):
        assert "manifest.json" in sentence, sentence


def _edit(artifact: Path, change: Callable[[dict], None]) -> None:
    path = artifact / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_newer_schema(artifact, tiny_artifact):
    _edit(artifact, lambda manifest: manifest.update(schema=[2, 0]))
    for sentence in _refusals(artifact, tiny_artifact):
        assert "newer" in sentence and "2.0" in sentence, sentence


def test_newer_minor_schema_still_loads(artifact):
    _edit(artifact, lambda manifest: manifest.update(schema=[1, 7], added_in_1_7={"anything": 1}))
    assert hetcomp.load(artifact)([1, 2, 3]).shape[0] == 3


def test_program_for_another_isa(artifact, tiny_artifact):
    _edit(artifact, lambda manifest: manifest["programs"][0].update(isa="avx1024"))
    for sentence in _refusals(artifact, tiny_artifact):
        assert "avx1024" in sentence, sentence


@pytest.mark.parametrize(
    "change",
    [
        {"offset": 1 << 60},
        {"offset": -64},
        {"bytes": 1 << 62},
        {"bytes": -1},
        {"file": "../../../../etc/passwd"},
        {"file": "/etc/passwd"},
        {"xxh3_64": "not hexadecimal"},
    ],
)
def test_weight_entry_that_points_outside(artifact, tiny_artifact, change):
    _edit(artifact, lambda manifest: manifest["weights"][0].update(change))
    for sentence in _refusals(artifact, tiny_artifact):
        assert str(artifact) in sentence or "manifest" in sentence, sentence


def test_folder_that_is_no_artifact(tmp_path, tiny_artifact):
    for sentence in _refusals(tmp_path / "nothing", tiny_artifact):
        assert "nothing" in sentence, sentence
    assert "manifest.json" in refusal("run", tmp_path, "--ids", "1")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--ids", "1,2,999999"), "999999"),
        (("--ids", "-1"), "-1"),
        (("--ids", "1,oyster"), "oyster"),
        (("--ids", ",".join(["3"] * 65)), "64"),
        (("--prompt", "no tokenizer here"), "tokenizer"),
        ((), "--ids"),
    ],
)
def test_requests_that_cannot_be_served(tiny_artifact, arguments, named):
    assert named in refusal("run", tiny_artifact, *arguments)
    if arguments:
        assert named in _binary_refusal(tiny_artifact, tiny_artifact / "bin" / "hetcomp-run", *arguments)
