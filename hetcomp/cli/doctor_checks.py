"""The single checks of ``hetcomp doctor``."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from packaging.requirements import Requirement

from hetcomp import installed_runtime
from hetcomp.backends.gpu.architectures import ARCHITECTURES
from hetcomp.backends.protocol import Isa
from hetcomp.backends.tvm_toolchain import check_versions
from hetcomp.errors import HetcompError
from hetcomp.hardware.compilers import CxxCompiler, find_cxx, installed_cxx
from hetcomp.hardware.detect import Machine, detect_machine
from hetcomp.hardware.gpus import GpuDriver, detect_gpus
from hetcomp.hardware.measure import cache_file
from hetcomp.hardware.profile import parse_profile

# Headers that the build of the runtime needs, and the Debian packages that have them.
_HEADERS = {
    "pcre2.h": "libpcre2-dev",
    "utf8proc.h": "libutf8proc-dev",
    "nlohmann/json.hpp": "nlohmann-json3-dev",
    "CLI/CLI.hpp": "libcli11-dev",
    "xxhash.h": "libxxhash-dev",
    "sha256.h": "libmd-dev",
}
_PROGRAM_ISAS = tuple(isa.value for isa in Isa)
_CMAKE = (3, 22)
_NINJA = (1, 10)


class Purpose(StrEnum):
    """What a user may want to do."""

    COMPILE = "compile models"
    RUN = "run compiled models"
    BUILD = "build hetcomp from source"
    GPU = "use a GPU"


@dataclass(frozen=True)
class Check:
    """One line of the report. ``ok`` is None for a mere fact. ``advice`` says what to do if it is False."""

    name: str
    found: str
    ok: bool | None = None
    purposes: tuple[Purpose, ...] = ()
    advice: str = ""


def ready(checks: list[Check], purpose: Purpose) -> bool:
    """Whether nothing that ``purpose`` needs is missing."""
    return not any(check.ok is False and purpose in check.purposes for check in checks)


def all_checks() -> list[Check]:
    """Looks at the machine and the installation; measures nothing and changes nothing."""
    machine = detect_machine()
    return [
        *machine_checks(machine),
        _profile(machine),
        *compiler_checks(),
        _tool("cmake", _CMAKE, "apt-get install cmake"),
        _tool("ninja", _NINJA, "apt-get install ninja-build"),
        _headers(),
        *package_checks(),
        _tvm(),
        _runtime(),
        gpu_check(driver := detect_gpus()),
        gpu_code_check(driver, installed_version("triton")),
    ]


def machine_checks(machine: Machine) -> list[Check]:
    """CPU, instruction sets, cores, memory as this process may use them."""
    known = [isa for isa in machine.isas if isa in _PROGRAM_ISAS]
    cores = sum(len(node.cores) for node in machine.nodes)
    quota = f", CPU quota of the cgroup {machine.quota:g}" if machine.quota is not None else ""
    nodes = "; ".join(
        f"node {node.id}: {len(node.cores)} cores, {_gb(node.memory_bytes)}, {_gb(node.available_bytes)} available"
        for node in machine.nodes
    )
    limit = f", the cgroup allows {_gb(machine.memory_limit)} more" if machine.memory_limit is not None else ""
    caches = ", ".join(f"L{c.level} {c.instances} x {c.bytes >> 10:,} KiB" for c in machine.caches)
    pages = machine.huge_pages
    return [
        Check("CPU", machine.cpu),
        Check(
            "instruction sets",
            ", ".join(machine.isas) or "none of those that matter",
            bool(known),
            (Purpose.RUN,),
            "the CPU must have at least AVX2 and FMA (x86-64-v3)",
        ),
        Check("cores", f"{cores} cores, {machine.logical_cpus} logical, {machine.threads} used{quota}"),
        Check("caches", caches or "unknown"),
        Check("memory", f"{nodes}{limit}"),
        Check(
            "huge pages",
            f"transparent huge pages: {pages}"
            + ("; weights are read more slowly without them" if pages not in ("always", "madvise") else ""),
        ),
    ]


def _profile(machine: Machine) -> Check:
    cached = cache_file(machine)
    name = "measured figures"
    if not cached.is_file():
        return Check(name, "none yet; the first --hw auto measures this machine")
    try:
        profile = parse_profile(cached.read_text(encoding="utf-8"), str(cached))
    except (OSError, HetcompError):
        return Check(name, f"{cached} is not readable; the next --hw auto measures again")
    text = f"{profile.bandwidth():.1f} GB/s read by a node, barrier {profile.barrier_us:.2f} us"
    rates = [f"{r.weight_format} {r.gflops_per_core:.0f} GFLOP/s a core ({r.isa})" for r in profile.rates]
    return Check(name, "; ".join(filter(None, [text, ", ".join(rates), profile.origin])))


def compiler_checks() -> list[Check]:
    """The compiler that will be used, and the others that are installed."""
    seen = installed_cxx()
    others = "; ".join(f"{c.path}: {c.identity}" for c in seen)
    purposes = (Purpose.COMPILE, Purpose.BUILD)
    try:
        chosen: CxxCompiler = find_cxx()
    except HetcompError as error:
        return [Check("C++ compiler", others or "none", False, purposes, str(error))]
    checks = [Check("C++ compiler", f"{chosen.path}: {chosen.identity}", True, purposes)]
    if rest := "; ".join(f"{c.path}: {c.identity}" for c in seen if c.path != chosen.path):
        checks.append(Check("other compilers", rest))
    return checks


def _tool(name: str, minimum: tuple[int, int], advice: str) -> Check:
    wanted = ".".join(map(str, minimum))
    beside = Path(sys.executable).parent / name  # of a virtual environment that is not activated
    path = shutil.which(name) or (str(beside) if beside.is_file() else None)
    version = _version_of(path) if path else None
    if path is None or version is None:
        return Check(name, "not installed", False, (Purpose.BUILD,), f"{advice} ({wanted} or newer)")
    spelled = ".".join(map(str, version))
    advice = f"{wanted} or newer is needed; pip install {name}"
    return Check(name, f"{path}: {spelled}", version >= minimum, (Purpose.BUILD,), advice)


def _version_of(path: str) -> tuple[int, ...] | None:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"\d+(?:\.\d+)+", done.stdout)
    return tuple(int(part) for part in found.group().split(".")) if found and done.returncode == 0 else None


def _headers() -> Check:
    try:
        compiler = find_cxx()
    except HetcompError:
        return Check("libraries' headers", "not checked without a C++ compiler")
    missing = [package for header, package in _HEADERS.items() if not _has_header(compiler, header)]
    found = f"{len(_HEADERS) - len(missing)} of {len(_HEADERS)} are there"
    return Check("libraries' headers", found, not missing, (Purpose.BUILD,), f"apt-get install {' '.join(missing)}")


def _has_header(compiler: CxxCompiler, header: str) -> bool:
    text = f"#if !__has_include(<{header}>)\n#error\n#endif\n"
    command = [str(compiler.path), "-std=c++20", "-E", "-x", "c++", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True).returncode == 0


def package_checks(
    installed: Callable[[str], str | None] | None = None, requirements: list[str] | None = None
) -> list[Check]:
    """Python itself and the packages that hetcomp requires: torch and transformers by name, the others together."""
    installed = installed or installed_version
    requirements = requirements if requirements is not None else importlib.metadata.requires("hetcomp") or []
    checks = [Check("Python", sys.version.split()[0], sys.version_info >= (3, 11), (Purpose.COMPILE,))]
    wrong = []
    parsed = [r for r in map(Requirement, requirements) if r.marker is None or r.marker.evaluate({"extra": ""})]
    for wanted in parsed:
        version = installed(wanted.name)
        fits = version is not None and wanted.specifier.contains(version, prereleases=True)
        if wanted.name in ("torch", "transformers"):
            advice = f"pip install '{wanted}'"
            checks.append(Check(wanted.name, version or "not installed", fits, (Purpose.COMPILE,), advice))
        elif not fits and not wanted.name.startswith("apache-tvm"):
            wrong.append(f"'{wanted}'")
    found = f"{len(parsed)} required, " + (f"{len(wrong)} missing or of another version" if wrong else "all fit")
    advice = f"pip install {' '.join(wrong)}"
    checks.append(Check("other packages", found, not wrong, (Purpose.COMPILE,), advice))
    return checks


def installed_version(package: str) -> str | None:
    """Version of an installed Python package; None if it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tvm() -> Check:
    tvm, ffi = installed_version("apache-tvm"), installed_version("apache-tvm-ffi")
    found = f"apache-tvm {tvm or 'not installed'}, apache-tvm-ffi {ffi or 'not installed'}"
    try:
        check_versions(tvm, ffi)
    except HetcompError as error:
        return Check("TVM", found, False, (Purpose.COMPILE,), str(error))
    return Check("TVM", f"{found} (the pair that is known to work)", True, (Purpose.COMPILE,))


def _runtime() -> Check:
    name, purposes = "runtime", (Purpose.COMPILE, Purpose.RUN)
    try:
        installed_runtime.executable()
        return Check(name, str(installed_runtime.library()), True, purposes)
    except HetcompError as error:
        return Check(name, "not installed", False, purposes, str(error))


def gpu_check(driver: GpuDriver) -> Check:
    """The NVIDIA driver and its devices. Having none is normal."""
    if driver.state != "usable":
        advice = "install the NVIDIA driver"
        return Check("GPU driver", driver.state, False, (Purpose.GPU,), advice)
    devices = ", ".join(
        f"{gpu.name} ({_gb(gpu.memory_bytes)}, compute capability {'.'.join(map(str, gpu.compute_capability))})"
        for gpu in driver.gpus
    )
    found = f"driver {driver.version or 'unknown'}, CUDA {driver.cuda}: {devices or 'no devices'}"
    return Check("GPU driver", found, bool(driver.gpus), (Purpose.GPU,), "the driver shows no device")


def gpu_code_check(driver: GpuDriver, triton: str | None) -> Check:
    """Whether GPU code can be compiled, and for the devices that are here."""
    known = ", ".join(f"{cc // 10}.{cc % 10}" for cc in ARCHITECTURES)
    here = {gpu.name: 10 * gpu.compute_capability[0] + gpu.compute_capability[1] for gpu in driver.gpus}
    strangers = [name for name, cc in here.items() if cc not in ARCHITECTURES]
    found = f"triton {triton or 'not installed'}; kernels for compute capability {known}"
    advice = "pip install 'hetcomp[gpu]'"
    if triton is not None and strangers:
        advice = f"{', '.join(strangers)} has another compute capability: compile with --vram 0"
    return Check("GPU code", found, triton is not None and not strangers, (Purpose.GPU,), advice)


def _gb(bytes: int) -> str:
    return f"{bytes / 1e9:.1f} GB"
