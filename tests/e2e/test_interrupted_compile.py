"""Compiling while the disk fills up, beside another process, or until Ctrl-C: whole or nothing, never half."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import hetcomp
from hetcomp.artifact.staging import staged_folder
from hetcomp.cli.start import INTERRUPTED
from hetcomp.errors import HetcompError
from hetcomp.hardware.detect import detect_machine
from hetcomp.hardware.measure import cache_file
from tests.e2e.command_line import listing, refusal
from tests.reference import tiny_models

_COMMAND = [sys.executable, "-c", "from hetcomp.cli.start import main; main()"]


def _start(
    checkpoint: Path, out: Path, limit: Callable[[], None] | None = None, **environment: str
) -> subprocess.Popen[str]:
    command = [*_COMMAND, "compile", str(checkpoint), "-o", str(out), "--formats", "f32", "--context", "64"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment, preexec_fn=limit)


@pytest.mark.slow
def test_disk_full_leaves_nothing(tmp_path):
    checkpoint, place = tmp_path / "model", tmp_path / "place"
    # An embedding of 10 MB: far above the limit, which all code stays below.
    tiny_models.save_tiny("qwen3_moe", checkpoint, vocab_size=40_000)
    place.mkdir()

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, 8 << 20))

    process = _start(checkpoint, place / "out.hetc", limit_file_size)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    assert "disk is full" in err and "out.hetc" in err and "Traceback" not in err
    assert listing(place) == []


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root; RLIMIT_FSIZE covers the rest")
def test_small_file_system_leaves_nothing(tiny_checkpoint, tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"this root may not mount: {mounted.stderr.decode().strip()}")
    try:
        sentence = refusal("compile", tiny_checkpoint, "-o", place / "out.hetc", "--formats", "f32")
        assert "disk is full" in sentence and "out.hetc" in sentence
        assert listing(place) == []
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_second_process_is_refused_while_the_first_writes(tiny_checkpoint, tmp_path):
    out = tmp_path / "out.hetc"
    with staged_folder(out) as staging:
        (staging / "manifest.json").write_text("{}")
        sentence = refusal("compile", tiny_checkpoint, "-o", out, "--formats", "f32", "--context", "64")
        assert str(os.getpid()) in sentence and "out.hetc" in sentence
        assert (staging / "manifest.json").exists(), "the second process touched the first one's files"
    assert listing(tmp_path) == ["out.hetc"]
    assert (out / "manifest.json").read_text() == "{}"


@pytest.mark.slow
def test_two_processes_at_once_leave_one_whole_artifact(tiny_checkpoint, tmp_path):
    out = tmp_path / "out.hetc"
    processes = [_start(tiny_checkpoint, out) for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert 0 in codes, errors
    for code, error in zip(codes, errors, strict=True):
        assert code == 0 or (code == 1 and "is writing" in error and "Traceback" not in error), error
    assert listing(tmp_path) == ["out.hetc"]
    assert hetcomp.load(out)([1, 2, 3]).shape[0] == 3


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["starting", "compiling kernels"])
def test_ctrl_c_leaves_nothing(tiny_checkpoint, tmp_path, stage):
    place, cache = tmp_path / "place", tmp_path / "cache"
    place.mkdir()
    machine = cache_file(detect_machine())
    cache.mkdir()
    shutil.copyfile(machine, cache / machine.name)
    process = _start(tiny_checkpoint, place / "out.hetc", HETCOMP_CACHE=str(cache))
    # A cache without objects makes the kernels' compilation last seconds; the staging folder shows that it has begun.
    deadline = time.monotonic() + 400
    while stage != "starting" and not (
        any(name.endswith(".partial") for name in listing(place)) and (cache / "objects").exists()
    ):
        assert process.poll() is None and time.monotonic() < deadline, "compile ended before it could be stopped"
        time.sleep(0.02)
    if stage == "starting":
        time.sleep(2.5)  # within the imports or the trace
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert listing(place) == []


@pytest.mark.parametrize("command", ["main", "plan_main"])
def test_ctrl_c_while_the_command_is_imported(command):
    program = f"""
import os, signal, sys
from hetcomp.cli import start
class Interrupts:  # as a finder of modules, asked for all that a command imports
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupts)
start.{command}()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == f"{INTERRUPTED}\n"


def test_ctrl_c_while_replacing_keeps_the_old_artifact(artifact, monkeypatch):
    before = (artifact / "manifest.json").read_bytes()
    with pytest.raises(KeyboardInterrupt), staged_folder(artifact) as staging:
        (staging / "half").write_text("half")
        raise KeyboardInterrupt
    assert (artifact / "manifest.json").read_bytes() == before
    assert listing(artifact.parent) == [artifact.name]


def test_unwritable_place_is_named(tiny_checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HetcompError, match="file"):
        hetcomp.compile(tiny_checkpoint, formats="f32", context_length=64, out=tmp_path / "file" / "out.hetc")


def test_a_lock_whose_file_was_unlinked_guards_nothing(tmp_path):
    """A process that opened the lock file just before its owner removed it must not think that it holds it."""
    out, lock = tmp_path / "out.hetc", tmp_path / ".out.hetc.lock"
    with staged_folder(out):
        stale = lock.open("a+")
    assert not lock.exists()
    fcntl.flock(stale, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with staged_folder(out) as staging:  # the dead name does not keep others out
        (staging / "manifest.json").write_text("{}")
        with pytest.raises(HetcompError, match="Another hetcomp process"), staged_folder(out):
            pass
    stale.close()
    assert listing(tmp_path) == ["out.hetc"]
