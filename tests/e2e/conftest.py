"""A tiny checkpoint and its artifact, made once a test process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import hetcomp
from tests.reference import tiny_models


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """Qwen3-MoE in float32, in several shards."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-qwen3-moe"
    tiny_models.save_tiny("qwen3_moe", folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


@pytest.fixture(scope="session")
def tiny_artifact(tiny_checkpoint: Path, tmp_path_factory) -> Path:
    """The tiny checkpoint compiled for this machine in float32."""
    out = tmp_path_factory.mktemp("artifact") / "tiny.hetc"
    hetcomp.compile(tiny_checkpoint, formats="f32", context_length=64, max_batch=2, out=out)
    return out


@pytest.fixture
def artifact(tiny_artifact: Path, tmp_path: Path) -> Path:
    """A copy of the artifact to damage."""
    return Path(shutil.copytree(tiny_artifact, tmp_path / "tiny.hetc"))


@pytest.fixture(scope="session")
def flip_bit() -> Callable[[Path, int], None]:
    """Flips one bit of the byte at an offset of a file."""

    def flip(path: Path, offset: int) -> None:
        data = bytearray(path.read_bytes())
        data[offset] ^= 0x10
        path.write_bytes(bytes(data))

    return flip
