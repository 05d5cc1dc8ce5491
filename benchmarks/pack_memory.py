"""Memory of a compile by the form of the checkpoint, beside the largest tensor of the file: it is to hold at most that
and 1 GB.

python -m benchmarks.pack_memory [--kinds "GPTQ;AWQ"] [--folder FOLDER]

Each sample is `hetcomp compile` in a process of its own, of a file of benchmarks.large_checkpoints that has left the
page cache; kernels come from the cache if it has them. Every 10 ms /proc says how much memory the process has that is
its own, which nothing but swap could take: RssAnon and RssShmem. Pages of files (libraries, what is written) are not in
it, nor are compilers that it starts; VmHWM has all pages of the process. "imports" is a process that has done no more
than importing what a compile does, "demo-moe" a compile of that model of 44 MB.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from benchmarks import large_checkpoints, models
from benchmarks.cpu_e2e import show
from benchmarks.page_cache import leave_page_cache
from benchmarks.record import Record
from hetcomp.models_zoo import find

_OWN = ("RssAnon", "RssShmem")
_SAMPLED = 0.01  # seconds
_IMPORTS = "import hetcomp.compiler, hetcomp.build_artifact, hetcomp.frontend.from_transformers"


def _status(pid: int, *fields: str) -> int:
    """Bytes, of all fields together; 0 of a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    found = dict(line.split(":", 1) for line in lines)
    return sum(int(found[field].split()[0]) * 1024 for field in fields if field in found)


def _peaks(command: list[str]) -> tuple[float, float]:
    """GB of the process: of its own, at the most, and of all pages that it had at a time (VmHWM)."""
    own = high = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            own = max(own, _status(process.pid, *_OWN))
            high = max(high, _status(process.pid, "VmHWM"))
            time.sleep(_SAMPLED)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return own / 1e9, high / 1e9


def _compile(model: Path) -> tuple[float, float]:
    with tempfile.TemporaryDirectory(dir=models.FOLDER) as out:
        program = [sys.executable, "-c", "from hetcomp.cli.start import main; main()", "compile", str(model)]
        return _peaks([*program, "--formats", "auto", "--context", "1024", "-o", f"{out}/out.hetc"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", default=";".join(large_checkpoints.KINDS), help="separated by semicolons")
    parser.add_argument("--folder", type=Path, default=models.FOLDER / "large", help="of the files, 20 GB of all kinds")
    options = parser.parse_args()
    kinds = options.kinds.split(";")
    if unknown := set(kinds) - set(large_checkpoints.KINDS):
        parser.error(f"{', '.join(sorted(unknown))}: not among {'; '.join(large_checkpoints.KINDS)}")
    record = Record("pack_memory", {"kinds": kinds})
    models.FOLDER.mkdir(parents=True, exist_ok=True)
    idle = [sys.executable, "-c", f"{_IMPORTS}; import time; time.sleep(0.1)"]
    record.add("imports, own", "GB", _peaks(idle)[0], higher_is_better=False)
    record.add("demo-moe, own", "GB", _compile(find("demo-moe"))[0], higher_is_better=False)
    for kind in kinds:
        model, largest = _made(kind, options.folder / kind.replace(",", "").replace(" ", "_"))
        leave_page_cache(model.iterdir() if model.is_dir() else model.parent.iterdir())
        own, high = _compile(model)
        record.add(f"{kind}, own", "GB", own, higher_is_better=False)
        record.add(f"{kind}, VmHWM", "GB", high, higher_is_better=False)
        record.derived[f"{kind}, largest tensor, GB"] = largest
        record.derived[f"{kind}, own less the largest tensor, GB"] = own - largest
    show(record)
    print(record.write())


def _made(kind: str, folder: Path) -> tuple[Path, float]:
    """In a process of its own, whose memory goes with it."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(large_checkpoints.write, kind, folder).result()


if __name__ == "__main__":
    main()
