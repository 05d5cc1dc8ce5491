"""Boots a Debian kernel under qemu's software emulation with files of this test as its root."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

# Fetched by scripts/bootstrap.sh --test-packages; nothing of it is installed.
KERNEL = Path(__file__).parents[2] / "build" / "test-kernel" / "vmlinuz"
_CPUS = ("0-1", "2")
_MEBIBYTES = (640, 384)  # unequal, so that a node taken for the other shows


def needs_preparation() -> str | None:
    """What is missing, in a sentence; None if a machine can be booted."""
    if shutil.which("qemu-system-x86_64") is None:
        return "qemu-system-x86_64 is not installed: run make test-packages (or set HETCOMP_SKIP_QEMU=1)."
    if not KERNEL.is_file():
        return f"{KERNEL} is missing: run make test-packages (or set HETCOMP_SKIP_QEMU=1)."
    return None


def libraries(binaries: Sequence[Path]) -> dict[str, Path]:
    """The dynamic loader and the libraries that ``ldd`` names, by their place in the root."""
    found: dict[str, Path] = {}
    for binary in binaries:
        out = subprocess.run(["ldd", binary], capture_output=True, text=True, check=True).stdout
        found |= {word.lstrip("/"): Path(word).resolve() for word in out.split() if word.startswith("/")}
    return found


def boot(files: Mapping[str, Path | bytes], image: Path, timeout: float) -> str:
    """Runs ``/init`` of ``files`` (place in the root: file or its bytes) on two NUMA nodes, of two and one CPU, until
    it powers off, and returns what the console showed."""
    image.write_bytes(_cpio(files))
    command = ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-smp", "3", "-m", f"{sum(_MEBIBYTES)}M"]
    for node, (cpus, size) in enumerate(zip(_CPUS, _MEBIBYTES, strict=True)):
        command += ["-object", f"memory-backend-ram,size={size}M,id=m{node}"]
        command += ["-numa", f"node,memdev=m{node},cpus={cpus},nodeid={node}"]
    command += ["-numa", "dist,src=0,dst=1,val=21", "-nographic", "-no-reboot", "-kernel", str(KERNEL)]
    command += ["-initrd", str(image), "-append", "console=ttyS0 quiet panic=-1"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout)
    return done.stdout.decode(errors="replace").replace("\r", "") + done.stderr.decode(errors="replace")


def _cpio(files: Mapping[str, Path | bytes]) -> bytes:
    """An archive in cpio's newc format, as the kernel unpacks it (Documentation/driver-api/early-userspace)."""
    folders = {str(parent) for name in files for parent in Path(name).parents if str(parent) != "."}
    entries: list[tuple[str, int, bytes]] = [(folder, 0o040755, b"") for folder in sorted(folders)]
    for name, content in files.items():
        entries.append((name, 0o100755, content if isinstance(content, bytes) else content.read_bytes()))
    archive = bytearray()
    for inode, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1):
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        archive += b"070701" + "".join(f"{field:08X}" for field in fields).encode() + name.encode() + b"\0"
        archive += bytes(-len(archive) % 4) + data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def folder_files(folder: Path, place: Path) -> dict[str, Path | bytes]:
    """Every file below ``folder``, to lie below ``place``."""
    return {str(place / path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
