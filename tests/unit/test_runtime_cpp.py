"""The C++ tests of the runtime, built with sanitizers. They need CMake, Ninja and GoogleTest (make bootstrap)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "runtime_lib"
# Kept between runs, so that only what changed is built again.
BUILDS = Path(__file__).parents[2] / "build" / "tests"


def _run(command: list[str], **environment: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-6000:]}"


def _build(sanitizers: str, target: str) -> Path:
    folder = BUILDS / sanitizers.replace(",", "-")
    definitions = [f"-DHETCOMP_SANITIZE={sanitizers}", "-DHETCOMP_TESTS=ON", "-DCMAKE_BUILD_TYPE=Debug"]
    _run(["cmake", "-G", "Ninja", "-S", str(SOURCES), "-B", str(folder), *definitions])
    _run(["cmake", "--build", str(folder), "--parallel", "2", "--target", target])
    return folder / "tests" / target


@pytest.mark.slow
def test_everything_under_address_and_undefined_sanitizers():
    _run(
        [str(_build("address,undefined", "hetcomp_tests")), "--gtest_brief=1"],
        ASAN_OPTIONS="detect_leaks=1:abort_on_error=0",
        UBSAN_OPTIONS="print_stacktrace=1",
    )


@pytest.mark.slow
@pytest.mark.exhaustive
def test_lanes_under_thread_sanitizer():
    _run([str(_build("thread", "hetcomp_lane_tests")), "--gtest_brief=1"], TSAN_OPTIONS="halt_on_error=1")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_gpu_hand_overs_under_thread_sanitizer():
    _run([str(_build("thread", "hetcomp_gpu_tests")), "--gtest_brief=1"], TSAN_OPTIONS="halt_on_error=1")
