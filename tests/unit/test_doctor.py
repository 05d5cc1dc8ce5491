"""hetcomp doctor: what counts as missing for what, and the exit code."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from hetcomp.cli import doctor as doctor_module
from hetcomp.cli.doctor import doctor
from hetcomp.cli.doctor_checks import (
    Check,
    Purpose,
    compiler_checks,
    gpu_check,
    machine_checks,
    package_checks,
    ready,
)
from hetcomp.hardware.compilers import find_cxx
from hetcomp.hardware.detect import Machine, NodeFacts
from hetcomp.hardware.figures import Gpu, Source
from hetcomp.hardware.gpus import GpuDriver


def machine(**changes: object) -> Machine:
    facts = dict(
        cpu="a CPU",
        isas=("avx2", "avx512_vnni"),
        nodes=(NodeFacts(0, (0, 1, 2, 3), (0, 1), 16_000_000_000, 8_000_000_000),),
        caches=(),
        threads=1,
        logical_cpus=4,
        quota=1.5,
        memory_limit=2_000_000_000,
        huge_pages="never",
    )
    return Machine(**{**facts, **changes})


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    find_cxx.cache_clear()
    yield
    find_cxx.cache_clear()


@pytest.mark.parametrize(
    ("purpose", "code"), [(Purpose.COMPILE, 1), (Purpose.RUN, 1), (Purpose.BUILD, 0), (Purpose.GPU, 0)]
)
def test_exit_code_is_one_only_for_what_the_cpu_way_needs(monkeypatch, capsys, purpose, code):
    lacking = Check("a thing", "not there", False, (purpose,), "get the thing")
    monkeypatch.setattr(doctor_module, "all_checks", lambda: [Check("CPU", "x"), lacking])
    assert doctor(as_json=False) == code
    text = capsys.readouterr().out
    assert "a thing: get the thing" in " ".join(text.split())
    assert text.count("ready") == len(Purpose) - 1


def test_json_tells_what_is_ready(monkeypatch, capsys):
    lacking = Check("cmake", "not installed", False, (Purpose.BUILD,), "apt-get install cmake")
    monkeypatch.setattr(doctor_module, "all_checks", lambda: [lacking])
    assert doctor(as_json=True) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ready"] == {purpose.value: purpose is not Purpose.BUILD for purpose in Purpose}
    assert document["checks"][0]["advice"] == "apt-get install cmake"


def test_this_machine_from_the_command_line():
    done = subprocess.run(
        [sys.executable, "-c", "from hetcomp.cli.start import main; main()", "doctor", "--json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    names = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert names["C++ compiler"]["ok"] and names["TVM"]["ok"] and names["runtime"]["ok"]
    assert names["torch"]["found"][0].isdigit()


def test_without_a_compiler_compiling_is_not_ready(no_compiler):
    checks = compiler_checks()
    assert not ready(checks, Purpose.COMPILE)
    assert ready(checks, Purpose.RUN)
    assert "apt-get install g++" in checks[0].advice


def test_machine_facts():
    checks = {check.name: check for check in machine_checks(machine())}
    assert checks["instruction sets"].ok
    assert "quota of the cgroup 1.5" in checks["cores"].found
    assert "8.0 GB available" in checks["memory"].found
    assert "the cgroup allows 2.0 GB more" in checks["memory"].found
    assert "read more slowly" in checks["huge pages"].found


@pytest.mark.parametrize("isas", [(), ("sve2",)])
def test_a_cpu_without_a_supported_instruction_set_cannot_run_models(isas):
    assert not ready(machine_checks(machine(isas=isas)), Purpose.RUN)


def test_packages_of_other_versions_are_named():
    versions = {"torch": "2.13.0+cpu", "transformers": "6.0.0", "numpy": None, "rich": "13.7"}
    wanted = ["torch>=2.8", "transformers>=5.15,<6", "numpy>=1.26", "rich>=13", 'pytest>=8; extra == "dev"']
    checks = {check.name: check for check in package_checks(versions.get, wanted)}
    assert checks["torch"].ok
    assert checks["transformers"].ok is False
    assert "transformers<6,>=5.15" in checks["transformers"].advice
    assert checks["other packages"].advice == "pip install 'numpy>=1.26'"
    assert checks["other packages"].found.startswith("4 required, 1 missing")


def test_gpu_driver_states():
    assert gpu_check(GpuDriver("absent")).ok is False
    gpu = Gpu(name="G", memory_bytes=10**10, compute_capability=(9, 0), source=Source.DATA_SHEET)
    found = gpu_check(GpuDriver("usable", "550.1", "12.4", (gpu,)))
    assert found.ok
    assert "driver 550.1, CUDA 12.4: G (10.0 GB, compute capability 9.0)" in found.found
    assert gpu_check(GpuDriver("usable", "550.1", "12.4", ())).ok is False
