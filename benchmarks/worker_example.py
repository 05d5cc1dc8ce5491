"""The smallest worker: shows the protocol and serves its test."""

from __future__ import annotations

import os

from benchmarks.worker import serve


def _fail() -> None:
    raise ValueError("odd")


def main() -> None:
    """Serves double, fail and leave."""
    print("what an engine prints must not disturb the answers")
    serve({"double": lambda value: 2 * value, "fail": _fail, "leave": lambda: os._exit(3)})


if __name__ == "__main__":
    main()
