"""Worker processes that hold one engine and one model each, so that engines can be measured in turns.

A worker is `python -m benchmarks.NAME_worker OPTIONS`, in whichever environment its engine lives. It answers
one JSON line per request line. It must not need anything but the standard library besides its engine,
because peers live in an environment of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

_REPOSITORY = Path(__file__).resolve().parent.parent
_ANSWERS = "HETCOMP_BENCH_ANSWERS"  # number of the file descriptor to answer on
Handler = Callable[..., Any]


def serve(handlers: Mapping[str, Handler]) -> None:
    """The worker's side: answers requests from standard input until it is closed.

    A request is {"call": NAME, "arguments": {..}}; the answer {"result": ..} or {"error": ".."}. Answers have a
    pipe of their own, since engines print what they like.
    """
    answers = os.fdopen(int(os.environ[_ANSWERS]), "w", buffering=1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": handlers[request["call"]](**request["arguments"])}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


class Worker:
    """The benchmark's side of a worker process; a context manager."""

    def __init__(self, python: str | Path, module: str, *arguments: str | Path) -> None:
        self.module = module
        command = [str(python), "-m", f"benchmarks.{module}", *map(str, arguments)]
        reading, writing = os.pipe()
        self._process = subprocess.Popen(
            command,
            cwd=_REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=2,
            text=True,
            bufsize=1,
            pass_fds=(writing,),
            env=os.environ | {_ANSWERS: str(writing)},
        )
        os.close(writing)
        self._answers = os.fdopen(reading)

    def call(self, name: str, **arguments: object) -> Any:  # noqa: ANN401 - JSON
        """Result of one request. Raises RuntimeError if the worker failed or died."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"call": name, "arguments": arguments}) + "\n")
            line = self._answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"{self.module} ended with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.module}.{name}: {answer['error']}")
        return answer["result"]

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()
