"""Which cases of tests `make test` runs: of those with several parameters every value of each at least once.

Cases are combinations: formats by instruction sets by shapes, families by devices. A fault that one value alone has is
found by any case with that value ("each choice coverage": Ammann and Offutt, Using formal methods to derive test frames
in category-partition testing, 1994); what only a combination of two has is left to `make test-all`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest

Choice = Mapping[str, str]  # of each parameter its value, as text


# Whether all cases run: tests/conftest.py sets it before tests are imported.
everything = True


def draws(count: int) -> int:
    """Of so many random examples, each of which compiles or takes long, those that run: all, or a tenth and at least
    two."""
    return count if everything else max(2, count // 10)


def each_choice(cases: Sequence[Choice]) -> list[int]:
    """Numbers of cases, ascending, among which every value of every parameter is: greedily those that have most that
    are new, of equals those whose values were chosen least, of equals the first."""
    missing = {pair for case in cases for pair in case.items()}
    uses: Counter[tuple[str, str]] = Counter()
    chosen: list[int] = []
    while missing:
        best = max(
            range(len(cases)),
            key=lambda i: (
                len(missing & set(cases[i].items())),
                -sum(uses[pair] for pair in cases[i].items()),
                -i,
            ),
        )
        chosen.append(best)
        uses.update(cases[best].items())
        missing -= set(cases[best].items())
    return sorted(chosen)


def rest(cases: Iterable[Any]) -> list[Any]:
    """Cases of `make test-all` alone, for what others have too."""
    return [pytest.param(case, marks=pytest.mark.exhaustive) for case in cases]


def left_out(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """What `make test` does not run of ``items``: tests marked exhaustive, and the cases that :func:`each_choice` does
    without. To tests of a module marked ``spread`` over a fixture with parameters, the test is one parameter more: each
    test on some value of the fixture, and each value in some test."""
    out = [item for item in items if item.get_closest_marker("exhaustive")]
    gone = set(map(id, out))
    together: dict[str, list[tuple[pytest.Item, Choice]]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec") and id(item) not in gone:
            shared = _spread_over(item)
            key = f"{item.path}:{shared}" if shared else item.nodeid.partition("[")[0]
            together[key].append((item, _choice(item, shared)))
    for cases in together.values():
        chosen = set(each_choice([choice for _, choice in cases]))
        out += [case for number, (case, _) in enumerate(cases) if number not in chosen]
    return out


def _spread_over(item: pytest.Function) -> str | None:
    marker = item.get_closest_marker("spread")
    return marker.args[0] if marker and marker.args[0] in item.callspec.params else None


def _choice(item: pytest.Function, shared: str | None) -> Choice:
    """Of tests that are chosen together, parameters of one alone are told apart by its name."""
    values = {name: repr(value) for name, value in item.callspec.params.items()}
    if not shared:
        return values
    own = {f"{item.originalname}.{name}": value for name, value in values.items() if name != shared}
    return {shared: values[shared], "test": item.originalname, **own}
