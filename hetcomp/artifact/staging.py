"""A folder that appears whole or not at all, and is written by one process at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hetcomp.errors import HetcompError


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``target`` which takes its place when the block ends without an exception.

    On any exception (Ctrl-C included) the staging folder is removed and ``target`` stays as it was. An existing
    ``target`` is replaced only if it is an artifact. Raises HetcompError if another process is writing
    to the same place, if ``target`` is something else, or if the disk is full.
    """
    target = target.absolute()
    _refuse_foreign(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target):
            staging = target.with_name(f".{target.name}.partial")
            # Under the lock a staging folder can only be the rest of a process that was killed.
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            try:
                yield staging
                _sync_tree(staging)
                _swap(staging, target)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise HetcompError(
                f"The disk is full while writing {target} ({error.strerror}); nothing was left behind. "
                "Free space or choose another place with -o."
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise HetcompError(f"Cannot write {target}: {error.strerror}. Choose another place with -o.") from error
        raise


def _refuse_foreign(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir() or (any(target.iterdir()) and not (target / "manifest.json").is_file()):
        raise HetcompError(
            f"{target} exists and is not a hetcomp artifact (no manifest.json in it); "
            "it is left alone. Choose another name with -o."
        )


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    path = target.with_name(f".{target.name}.lock")
    while True:
        with path.open("a+") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.seek(0)
                raise HetcompError(
                    f"Another hetcomp process (pid {handle.read().strip() or 'unknown'}) is writing {target}; "
                    "wait for it or choose another place with -o."
                ) from None
            if not _is_still(path, handle.fileno()):
                continue  # its owner unlinked it between our open and our lock: that lock guards nothing
            handle.truncate(0)
            handle.write(str(os.getpid()))
            handle.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether ``path`` names the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())


def _swap(staging: Path, target: Path) -> None:
    if target.exists():
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        staging.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        staging.rename(target)
    parent = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
