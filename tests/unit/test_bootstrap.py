"""scripts/bootstrap.sh on a machine that lacks things and may not install them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bootstrap.sh"


@pytest.fixture
def bare_path(tmp_path: Path) -> Path:
    """A folder of commands with a shell's bare necessities."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "dirname", "sort", "id", "cat", "rm"):
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    return folder


def _command(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def _run(path: Path, venv: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/bash", str(SCRIPT), str(venv), *options],
        env={"PATH": str(path), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_names_everything_that_is_missing_in_one_sentence(bare_path, tmp_path):
    done = _run(bare_path, tmp_path / "venv")
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    for package in ("python3", "g++", "cmake", "ninja-build", "libpcre2-dev", "libxxhash-dev"):
        assert package in lines[0]
    assert not (tmp_path / "venv").exists()


def test_asks_for_root_where_apt_is_there_but_not_permitted(bare_path, tmp_path):
    for name, text in {"apt-get": "exit 99", "id": "echo 1000"}.items():
        (bare_path / name).unlink(missing_ok=True)
        _command(bare_path / name, text)
    done = _run(bare_path, tmp_path / "venv")
    assert done.returncode == 1
    assert "needs root" in done.stderr and "apt-get install" in done.stderr and "g++" in done.stderr


def test_a_missing_browser_is_named_where_the_tests_are_prepared_and_nothing_else(bare_path, tmp_path):
    done = _run(bare_path, tmp_path / "venv", "--test-packages")
    assert done.returncode == 1
    assert "chromium" in done.stderr and "qemu-system-x86" in done.stderr and "g++" not in done.stderr
    _command(bare_path / "chromium", "")
    python = tmp_path / "venv" / "bin" / "python"
    _command(python, f'echo "$@" >> {tmp_path}/asked')
    done = _run(bare_path, tmp_path / "venv", "--test-packages", HETCOMP_SKIP_QEMU="1")
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[0] == "-c import triton" and "auto_gptq" in asked[1] and len(asked) == 2


def test_triton_is_installed_for_the_tests_in_the_version_that_hetcomp_asks_for(bare_path, tmp_path):
    _command(bare_path / "chromium", "")
    answers = 'case "$2" in "import triton") exit 1;; *requires*) echo "triton<3";; *) echo "$@";; esac'
    _command(tmp_path / "venv" / "bin" / "python", answers)
    done = _run(bare_path, tmp_path / "venv", "--test-packages", HETCOMP_SKIP_QEMU="1")
    assert done.returncode == 0, done.stderr
    assert any(line.endswith("install -qq triton<3") for line in done.stdout.splitlines())


def test_without_a_wheel_of_auto_gptq_the_tests_go_without_it(bare_path, tmp_path):
    _command(bare_path / "chromium", "")
    answers = 'case "$*" in *find_spec*|*auto-gptq*) exit 1;; esac'
    _command(tmp_path / "venv" / "bin" / "python", answers)
    done = _run(bare_path, tmp_path / "venv", "--test-packages", HETCOMP_SKIP_QEMU="1")
    assert done.returncode == 0, done.stderr
    assert "auto-gptq 0.7.1 has no wheel" in done.stdout
