"""Boots a Debian kernel under qemu's software emulation with files of this test as its root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

# Fetched by scripts/bootstrap.sh --test-packages; nothing of it is installed.
KERNEL = Path(__file__).parents[2] / "build" / "test-kernel" / "vmlinuz"
_CPUS = ("0-1", "2")
_MEBIBYTES = (640, 384)  # unequal, so that a node taken for the other shows
_SECTOR = 512
# Reads of one sector fail with EIO, always (qemu's docs/devel/blkdebug).
_BAD_SECTOR = """[inject-error]
event = "none"
iotype = "read"
errno = "5"
once = "off"
sector = "{}"
"""


def _tool(name: str) -> str | None:
    """Of e2fsprogs, which lie where only root looks."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@dataclass(frozen=True)
class Disk:
    """An ext4 file system in a file, which the guest finds as an NVMe disk. ``faults``: qemu's description of sectors
    that fail."""

    image: Path
    faults: Path | None = None

    @staticmethod
    def of_folder(folder: Path, place: Path, image: Path) -> Disk:
        """With ``folder`` lying at ``place``, and as much room again."""
        root = image.with_name(f"{image.name}-root")
        shutil.copytree(folder, root / place)
        size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        command = [_tool("mke2fs") or "mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", root, image]
        subprocess.run([*command, f"{2 * size // 1024 + 16384}k"], check=True)
        return Disk(image)

    def with_bad_sector(self, content: bytes) -> Disk:
        """The first sector of what holds ``content``, which must be nowhere else."""
        everything = self.image.read_bytes()
        assert everything.count(content) == 1
        sector, rest = divmod(everything.index(content), _SECTOR)
        assert rest == 0
        faults = self.image.with_name(f"{self.image.name}-faults")
        faults.write_text(_BAD_SECTOR.format(sector))
        return replace(self, faults=faults)


def needs_preparation() -> str | None:
    """What is missing, in a sentence; None if a machine can be booted."""
    if shutil.which("qemu-system-x86_64") is None:
        return "qemu-system-x86_64 is not installed: run make test-packages (or set HETCOMP_SKIP_QEMU=1)."
    if _tool("mke2fs") is None:
        return "mke2fs is not installed: run make test-packages (or set HETCOMP_SKIP_QEMU=1)."
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


def boot(files: Mapping[str, Path | bytes], image: Path, timeout: float, disk: Disk | None = None) -> str:
    """Runs ``/init`` of ``files`` (place in the root: file or its bytes) on two NUMA nodes, of two and one CPU, until
    it powers off, and returns what the console showed."""
    image.write_bytes(_cpio(files))
    command = ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-smp", "3", "-m", f"{sum(_MEBIBYTES)}M"]
    for node, (cpus, size) in enumerate(zip(_CPUS, _MEBIBYTES, strict=True)):
        command += ["-object", f"memory-backend-ram,size={size}M,id=m{node}"]
        command += ["-numa", f"node,memdev=m{node},cpus={cpus},nodeid={node}"]
    command += ["-numa", "dist,src=0,dst=1,val=21", "-nographic", "-no-reboot", "-kernel", str(KERNEL)]
    command += ["-initrd", str(image), "-append", "console=ttyS0 quiet panic=-1"]
    if disk is not None:
        source = f"blkdebug:{disk.faults or ''}:{disk.image}"
        command += ["-drive", f"file={source},format=raw,if=none,id=disk", "-device", "nvme,drive=disk,serial=disk"]
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
