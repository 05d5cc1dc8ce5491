"""The one exception type that users see."""

from __future__ import annotations


class HetcompError(Exception):
    """A refusal with one clear sentence: what, what was expected, what to do.

    Raised for bad input (files, configs, shapes, requests) and for what this machine lacks. The CLI prints the
    message and exits with 1; a traceback is shown only with ``--debug``. Anything else that escapes is a bug.
    """
