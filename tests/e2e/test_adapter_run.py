"""Adapters at run time through the command line: packed, run by name, refused; the same from the binary."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import hetcomp
from hetcomp.errors import HetcompError
from tests.e2e.command_line import listing, refusal, run
from tests.reference.peft_adapters import everything, make_adapter
from tests.reference.tiny_models import build

IDS = ("--ids", "5,6,7,8", "-n", "12", "--ignore-eos", "--print-ids")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Path:
    """Folders ``one`` and ``two``."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two")):
        make_adapter(build("qwen3_moe"), folder / name, seed=seed, **everything("qwen3_moe"))
    return folder


def ids_of(text: str) -> list[int]:
    return [int(part) for part in text.strip().split(",")]


def binary(artifact: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(artifact / "bin" / "hetcomp-run"), str(artifact), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_run_by_name_with_python_and_without(tiny_artifact, adapters, tmp_path):
    exe = hetcomp.load(tiny_artifact)
    exe.load_adapter(adapters / "one")
    want = [t.id for t in exe.generate([5, 6, 7, 8], 12, ignore_eos=True, adapter="one")]
    base = [t.id for t in exe.generate([5, 6, 7, 8], 12, ignore_eos=True)]
    assert want != base
    file = tmp_path / "one.hetlora"
    packed = run("adapter", "pack", tiny_artifact, adapters / "one", "-o", file)
    assert packed.code == 0 and "18 weights, rank 4" in packed.out, packed.err
    for spec in (f"any={file}", str(file), f"any={adapters / 'one'}"):
        outcome = run("run", tiny_artifact, "--adapter", spec, *IDS)
        assert outcome.code == 0, outcome.err
        assert ids_of(outcome.out) == want
    done = binary(tiny_artifact, "--adapter", f"any={file}", *IDS)
    assert (done.returncode, ids_of(done.stdout)) == (0, want), done.stderr
    # Several: the last one answers.
    run("adapter", "pack", tiny_artifact, adapters / "two", "-o", tmp_path / "two.hetlora", "--name", "second")
    both = ("--adapter", str(tmp_path / "two.hetlora"), "--adapter", str(file))
    assert ids_of(binary(tiny_artifact, *both, *IDS).stdout) == want
    assert ids_of(binary(tiny_artifact, *IDS).stdout) == base


@pytest.mark.slow
def test_refusals(tiny_artifact, adapters, tmp_path):
    file = tmp_path / "one.hetlora"
    assert "no folder" in refusal("adapter", "pack", tiny_artifact, tmp_path / "none", "-o", file)
    assert "no compiled model" in refusal("adapter", "pack", adapters, adapters / "one", "-o", file)
    assert listing(tmp_path) == []
    assert "is no NAME=PATH" in refusal("run", tiny_artifact, "--adapter", "=x", *IDS)
    assert "No such file" in refusal("run", tiny_artifact, "--adapter", f"a={file}", *IDS)
    run("adapter", "pack", tiny_artifact, adapters / "one", "-o", file)
    damaged = tmp_path / "damaged.hetlora"
    damaged.write_bytes(file.read_bytes()[:-100])
    assert "truncated" in refusal("run", tiny_artifact, "--adapter", f"a={damaged}", *IDS)
    done = binary(tiny_artifact, "--adapter", f"a={damaged}", *IDS)
    assert done.returncode == 1 and "truncated" in done.stderr
    assert binary(tiny_artifact, "--adapter", "=x", *IDS).returncode == 2


@pytest.mark.slow
def test_one_that_is_refused_leaves_the_others_alone(tiny_artifact, adapters):
    exe = hetcomp.load(tiny_artifact)
    name = exe.load_adapter(adapters / "one")
    tokens = exe.generate([5, 6, 7, 8], 12, ignore_eos=True, adapter=name)
    first = next(tokens)
    with pytest.raises(HetcompError, match="already"):
        exe.load_adapter(adapters / "two", "one")
    with pytest.raises(HetcompError, match="in use by 1 session"):
        exe.unload_adapter("one")
    assert exe.load_adapter(adapters / "two") == "two"
    rest = [first, *tokens]
    assert [t.id for t in rest] == [t.id for t in exe.generate([5, 6, 7, 8], 12, ignore_eos=True, adapter="one")]
    assert [a["name"] for a in exe.runtime.adapters()] == ["one", "two"]
    exe.unload_adapter("one")
    with pytest.raises(HetcompError, match="no adapter one among two"):
        exe.generate([5], adapter="one")
