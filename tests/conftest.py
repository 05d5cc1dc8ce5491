"""Options and fixtures of the whole suite."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import sampled_cases

pytest_plugins = ["pytester"]

# A worker of pytest-xdist has a core: torch's threads would spin on it while they wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How fast examples are drawn says how busy the machine is.
settings.register_profile("any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")

Golden = Callable[[Path, str], None]

# Kept between runs, as the builds beside it are.
CACHE = Path(__file__).parents[1] / "build" / "tests" / "cache"


def pytest_configure(config: pytest.Config) -> None:
    """All tests and what they start have a cache of their own, in which figures of this machine are estimates: measured
    beside tests they would be those of a busy machine, which whoever comes ten minutes later measures again, and plans
    would differ from run to run. Tests of measuring have empty caches."""
    named = any("::" in argument for argument in config.args) or config.option.keyword or config.option.markexpr
    whole = config.getoption("--all-cases") or config.getoption("--update-golden") or named
    sampled_cases.everything = bool(whole)
    # Only now: Triton may come with it.
    from hetcomp.hardware.detect import detect_machine
    from hetcomp.hardware.measure import cache_file, keep, read_cached
    from hetcomp.profiler.measure_machine import estimated_profile

    os.environ["HETCOMP_CACHE"] = str(CACHE)
    machine = detect_machine()
    if read_cached(cache_file(machine)) is None:
        keep(estimated_profile(machine, "not measured: for tests"), cache_file(machine))


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--update-golden`` rewrites golden files instead of comparing with them; ``--all-cases`` leaves nothing out."""
    parser.addoption("--update-golden", action="store_true", help="rewrite golden files from what the code does")
    parser.addoption("--all-cases", action="store_true", help="also what tests/sampled_cases.py leaves out")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves cases out, unless all or some were asked for by name. First what takes minutes in one test: at the end
    one worker would wait for it."""
    if not sampled_cases.everything:
        out = sampled_cases.left_out(items)
        config.hook.pytest_deselected(items=out)
        gone = set(map(id, out))
        items[:] = [item for item in items if id(item) not in gone]
    items.sort(key=lambda item: item.path.name != "test_runtime_cpp.py")


def pytest_collection_finish() -> None:
    """Whoever imports models has imported the frontend now."""
    if "hetcomp.frontend" in sys.modules:
        from tests.reference.kept_traces import keep_traces

        keep_traces()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """``golden(path, text)``: the file at ``path`` must hold ``text``; the difference is shown."""
    update = request.config.getoption("--update-golden")

    def check(path: Path, text: str) -> None:
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        kept = path.read_text(encoding="utf-8") if path.exists() else ""
        if kept != text:
            lines = difflib.unified_diff(
                kept.splitlines(), text.splitlines(), f"{path} (kept)", "now", lineterm="", n=2
            )
            shown = "\n".join(list(lines)[:80])
            pytest.fail(f"{path.name} is no longer true; look, then run pytest --update-golden:\n{shown}")

    return check
