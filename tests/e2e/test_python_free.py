"""The artifact in a root file system that holds the C library and nothing else of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import hetcomp
from hetcomp.models_zoo import find

PROMPT = "The old house stood"


def _needed(binary: Path) -> list[Path]:
    """The dynamic loader and the libraries that ``ldd`` names."""
    out = subprocess.run(["ldd", binary], capture_output=True, text=True, check=True).stdout
    return [Path(word) for word in out.split() if word.startswith("/")]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("free") / "demo.hetc"
    hetcomp.compile(find("demo-moe"), formats="f32", context_length=512, out=out)
    return out


@pytest.fixture(scope="module")
def bare_root(artifact: Path, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(artifact, root / "demo.hetc")
    libraries = set(_needed(artifact / "bin" / "hetcomp-run"))
    for program in (artifact / "kernels").glob("lib_*.so"):
        libraries |= set(_needed(program))
    allowed = ("libc.so", "libm.so", "libstdc++.so", "libgcc_s.so", "ld-linux")
    for library in libraries:
        assert library.name.startswith(allowed), f"the artifact leans on {library}"
        target = root / library.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library, target)
        target.chmod(0o755)
    (root / "proc").mkdir()
    return root


def _tool(name: str) -> str:
    path = shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")
    assert path, f"{name} is not installed"
    return path


def _in_root(root: Path, *args: str) -> subprocess.CompletedProcess[bytes]:
    """Runs the artifact's binary with ``root`` as its root: by chroot as root, in a user namespace
    otherwise.
    """
    command = ["/demo.hetc/bin/hetcomp-run", "/demo.hetc", *args]
    if os.geteuid() == 0:
        wrap = [_tool("chroot"), str(root)]
    else:
        wrap = [_tool("unshare"), "--user", "--map-root-user", f"--root={root}"]
    # An empty environment: nothing of this machine's Python or library paths gets in.
    return subprocess.run([*wrap, *command], capture_output=True, env={}, timeout=120)


@pytest.mark.slow
def test_text_is_byte_equal_to_python(artifact: Path, bare_root: Path):
    exe = hetcomp.load(artifact)
    want = "".join(t.text for t in exe.generate(PROMPT, max_new_tokens=64, ignore_eos=True))
    done = _in_root(bare_root, "--prompt", PROMPT, "-n", "64", "--ignore-eos")
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.rstrip(b"\n") == want.encode().rstrip(b"\n")
    assert len(want) > 64


@pytest.mark.slow
def test_ids_are_equal_to_python_when_sampling(artifact: Path, bare_root: Path):
    exe = hetcomp.load(artifact)
    options = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.02, "seed": 7}
    want = [t.id for t in exe.generate([5, 6, 7, 8], max_new_tokens=48, ignore_eos=True, **options)]
    flags = [part for k, v in options.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    done = _in_root(bare_root, "--ids", "5,6,7,8", "-n", "48", "--ignore-eos", "--print-ids", *flags)
    assert done.returncode == 0, done.stderr.decode()
    got = [int(part) for part in done.stdout.decode().replace(",", " ").split()]
    assert got == want
    assert len(set(want)) > 8


@pytest.mark.slow
def test_no_python_in_the_root(bare_root: Path):
    names = {path.name for path in bare_root.rglob("*")}
    assert not [name for name in names if "python" in name.lower()]
