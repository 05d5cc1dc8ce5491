"""Which cases of tests `make test` runs: of those with several parameters every value of each at least once.

Cases are combinations: formats by instruction sets by shapes, families by devices. A fault that one value alone has is
found by any case with that value ("each choice coverage": Ammann and Offutt, Using formal methods to derive test frames
in category-partition testing, 1994); what only a combination of two has is left to `make test-all`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import pytest

Choice = Mapping[str, str]  # of each parameter its value, as text


def each_choice(cases: Sequence[Choice]) -> list[int]:
    """Numbers of cases, ascending, among which every value of every parameter is: greedily those that have most that
    are new, of equals the first."""
    missing = {pair for case in cases for pair in case.items()}
    chosen: list[int] = []
    while missing:
        best = max(range(len(cases)), key=lambda i: (len(missing & set(cases[i].items())), -i))
        chosen.append(best)
        missing -= set(cases[best].items())
    return sorted(chosen)


def left_out(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """What `make test` does not run of ``items``: tests marked exhaustive, and the cases that :func:`each_choice` does
    without."""
    out = [item for item in items if item.get_closest_marker("exhaustive")]
    by_function: dict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if (
            isinstance(item, pytest.Function)
            and hasattr(item, "callspec")
            and not item.get_closest_marker("exhaustive")
        ):
            by_function[item.nodeid.partition("[")[0]].append(item)
    for cases in by_function.values():
        choices = [{name: repr(value) for name, value in case.callspec.params.items()} for case in cases]
        chosen = set(each_choice(choices))
        out += [case for number, case in enumerate(cases) if number not in chosen]
    return out
