"""``hetcomp doctor``: what this machine has, and what is missing for what."""

from __future__ import annotations

import json

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from hetcomp.cli.doctor_checks import Check, Purpose, all_checks, ready

_SCHEMA = (1, 0)
_MARKS = {True: Text("ok", style="green"), False: Text("missing", style="red"), None: Text("–", style="dim")}


def doctor(as_json: bool) -> int:
    """Prints what was found on stdout, as tables or as JSON.

    Returns the exit code: 1 if something that compiling for and running on the CPU needs is missing, else 0. What
    only building from source or a GPU needs may be missing.
    """
    checks = all_checks()
    if as_json:
        print(doctor_json(checks))
    else:
        Console().print(doctor_report(checks))
    return 0 if ready(checks, Purpose.COMPILE) and ready(checks, Purpose.RUN) else 1


def doctor_json(checks: list[Check]) -> str:
    """The checks as a JSON document."""
    document = {
        "schema": list(_SCHEMA),
        "checks": [
            {
                "name": check.name,
                "ok": check.ok,
                "found": check.found,
                "advice": check.advice,
                "needed_for": [purpose.value for purpose in check.purposes],
            }
            for check in checks
        ],
        "ready": {purpose.value: ready(checks, purpose) for purpose in Purpose},
    }
    return json.dumps(document, indent=2)


def doctor_report(checks: list[Check]) -> Group:
    """The checks as tables: facts and tools, then what each purpose still lacks."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        table.add_row(Text(check.name), _MARKS[check.ok], Text(check.found))
    verdict = Table(show_header=False, box=None, pad_edge=False)
    verdict.add_column(no_wrap=True)
    verdict.add_column()
    for purpose in Purpose:
        lacking = [check for check in checks if check.ok is False and purpose in check.purposes]
        text = "; ".join(f"{check.name}: {check.advice}" for check in lacking)
        verdict.add_row(Text(purpose.value), Text(text, style="red") if lacking else Text("ready", style="green"))
    return Group(table, Text(), verdict)
