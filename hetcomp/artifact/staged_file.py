"""A file that appears whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hetcomp.errors import HetcompError


def write_whole(target: Path, content: bytes) -> None:
    """Writes the file. Raises HetcompError naming it; what was there stays then."""
    staged: Path | None = None
    try:
        with tempfile.NamedTemporaryFile("wb", dir=target.parent, prefix=f".{target.name}-", delete=False) as file:
            staged = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(target)
    except OSError as error:
        raise HetcompError(f"{target} cannot be written: {error.strerror or error}.") from None
    finally:
        if staged is not None:
            staged.unlink(missing_ok=True)
