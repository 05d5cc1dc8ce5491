"""Detection on file trees like those of /proc and /sys: NUMA, hyperthreads, caches, cgroups of both versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from hetcomp.errors import HetcompError
from hetcomp.hardware import compilers
from hetcomp.hardware.detect import cpu_list, detect_machine
from hetcomp.hardware.figures import Gpu, Source
from hetcomp.hardware.gpu_estimates import completed
from hetcomp.hardware.gpus import detect_gpus
from hetcomp.hardware.limits import cpu_quota, memory_left
from hetcomp.passes.device_time import gpu_tflops, link_gb_per_s

V3 = "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"
V4 = f"{V3} avx512f avx512bw avx512cd avx512dq avx512vl"
GIB = 1 << 30


def write(root: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def two_sockets(root: Path, flags: str = V4) -> Path:
    """8 logical CPUs: 2 nodes with 2 cores of 2 hyperthreads each; node 1 has twice the memory of node 0."""
    files: dict[str, object] = {
        "proc/cpuinfo": f"processor : 0\nmodel name : Test CPU\nflags : fpu {flags}\n",
        "proc/meminfo": f"MemTotal: {3 * GIB // 1024} kB\nMemAvailable: {GIB // 1024} kB",
        "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never",
    }
    for node, (cpus, gib) in enumerate([("0-1,4-5", 1), ("2-3,6-7", 2)]):
        folder = f"sys/devices/system/node/node{node}"
        files[f"{folder}/cpulist"] = cpus
        files[f"{folder}/meminfo"] = (
            f"Node {node} MemTotal: {gib * GIB // 1024} kB\nNode {node} MemFree: {gib * GIB // 2048} kB"
        )
    for cpu in range(8):
        core = f"sys/devices/system/cpu/cpu{cpu}"
        files[f"{core}/topology/thread_siblings_list"] = f"{cpu % 4},{cpu % 4 + 4}"
        socket = "0-1,4-5" if cpu % 4 < 2 else "2-3,6-7"
        for i, (level, kind, size, shared) in enumerate(
            [
                (1, "Data", "32K", f"{cpu % 4},{cpu % 4 + 4}"),
                (1, "Instruction", "32K", "x"),
                (3, "Unified", "8192K", socket),
            ]
        ):
            index = f"{core}/cache/index{i}"
            files |= {f"{index}/level": level, f"{index}/type": kind, f"{index}/size": size}
            files[f"{index}/shared_cpu_list"] = shared
    return write(root, files)


def test_nodes_cores_and_caches(tmp_path):
    machine = detect_machine(two_sockets(tmp_path), frozenset(range(8)))
    assert machine.cpu == "Test CPU"
    assert [(n.id, n.cpus, n.cores) for n in machine.nodes] == [(0, (0, 1, 4, 5), (0, 1)), (1, (2, 3, 6, 7), (2, 3))]
    assert (machine.threads, machine.logical_cpus, machine.quota) == (4, 8, None)
    assert [(c.level, c.bytes, c.instances) for c in machine.caches] == [(1, 32 << 10, 4), (3, 8 << 20, 2)]
    assert machine.huge_pages == "madvise"


def test_memory_of_the_nodes_adds_up_to_the_machines(tmp_path):
    machine = detect_machine(two_sockets(tmp_path), frozenset(range(8)))
    assert [n.memory_bytes for n in machine.nodes] == [GIB, 2 * GIB]
    assert [n.available_bytes for n in machine.nodes] == pytest.approx([GIB / 3, 2 * GIB / 3], rel=1e-6)


def test_affinity_leaves_out_cpus(tmp_path):
    machine = detect_machine(two_sockets(tmp_path), frozenset({1, 5, 6}))
    assert [(n.id, n.cores) for n in machine.nodes] == [(0, (1,)), (1, (6,))]
    assert (machine.threads, machine.logical_cpus) == (2, 3)


@pytest.mark.parametrize(
    ("flags", "isas"),
    [
        (V3, ("avx2",)),
        (V4, ("avx2", "avx512")),
        (f"{V4} avx512_vnni avx512_bf16", ("avx2", "avx512", "avx512_vnni", "avx512_bf16")),
        ("avx avx2", ()),
        (V4.replace(" avx512vl", ""), ("avx2",)),
        ("", ()),
    ],
)
def test_instruction_sets_need_all_of_their_flags(tmp_path, flags, isas):
    assert detect_machine(two_sockets(tmp_path, flags), frozenset({0})).isas == isas


def test_a_machine_without_sysfs_is_one_node(tmp_path):
    root = write(tmp_path, {"proc/meminfo": "MemTotal: 1000 kB\nMemAvailable: 500 kB"})
    machine = detect_machine(root, frozenset({0, 1}))
    assert [(n.id, n.cores, n.memory_bytes, n.available_bytes) for n in machine.nodes] == [(0, (0, 1), 1024000, 512000)]


def test_kernel_lists():
    assert cpu_list("0-3,8\n") == (0, 1, 2, 3, 8)
    assert cpu_list("\n") == ()


def cgroup_v2(root: Path, groups: dict[str, object], path: str = "/user/job", mounted: str = "/") -> Path:
    """A /proc/self whose cgroup v2 hierarchy lies in ``root``/cg."""
    write(root, {f"cg/{name}": text for name, text in groups.items()})
    return write(
        root / "self",
        {
            "cgroup": f"0::{path}",
            "mountinfo": f"30 20 0:26 {mounted} {root}/cg rw,nosuid shared:4 - cgroup2 cgroup2 rw",
        },
    )


def test_quota_is_the_smallest_of_the_enclosing_groups(tmp_path):
    groups = {"user/job/cpu.max": "max 100000", "user/cpu.max": "150000 100000", "cpu.max": "400000 100000"}
    assert cpu_quota(cgroup_v2(tmp_path, groups)) == 1.5


def test_no_limits(tmp_path):
    proc = cgroup_v2(tmp_path, {"user/job/cpu.max": "max 100000", "user/job/memory.max": "max"})
    assert (cpu_quota(proc), memory_left(proc)) == (None, None)
    assert (cpu_quota(tmp_path / "nothing"), memory_left(tmp_path / "nothing")) == (None, None)


def test_file_cache_counts_as_free_memory(tmp_path):
    groups = {
        "user/job/memory.max": 1000,
        "user/job/memory.current": 700,
        "user/job/memory.stat": "anon 100\ninactive_file 150\nactive_file 50\n",
    }
    assert memory_left(cgroup_v2(tmp_path, groups)) == 1000 - (700 - 200)


def test_a_container_sees_its_own_group_as_root(tmp_path):
    groups = {"memory.max": 1000, "memory.current": 400}
    assert memory_left(cgroup_v2(tmp_path, groups, "/docker/abc", mounted="/docker/abc")) == 600
    assert memory_left(cgroup_v2(tmp_path, groups, "/elsewhere", mounted="/docker/abc")) == 600


def test_cgroups_of_version_1(tmp_path):
    write(
        tmp_path,
        {
            "cpu/job/cpu.cfs_quota_us": 50000,
            "cpu/job/cpu.cfs_period_us": 100000,
            "cpu/cpu.cfs_quota_us": -1,
            "cpu/cpu.cfs_period_us": 100000,
            "mem/job/memory.limit_in_bytes": 5000,
            "mem/job/memory.usage_in_bytes": 4000,
            "mem/job/memory.stat": "total_inactive_file 1000\ninactive_file 1\n",
            "mem/memory.limit_in_bytes": 9223372036854771712,
            "mem/memory.usage_in_bytes": 4000,
        },
    )
    proc = write(
        tmp_path / "self",
        {
            "cgroup": "4:memory:/job\n2:cpu,cpuacct:/job\n0::/",
            "mountinfo": f"31 20 0:27 / {tmp_path}/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
            f"32 20 0:28 / {tmp_path}/mem rw - cgroup cgroup rw,memory",
        },
    )
    assert cpu_quota(proc) == 0.5
    assert memory_left(proc) == 2000


def test_threads_are_the_quota_rounded_down_but_at_least_one(tmp_path):
    root = two_sockets(tmp_path)
    for quota, threads in (("50000", 1), ("250000", 2), ("900000", 4)):
        write(root, {"cg/cpu.max": f"{quota} 100000"})
        write(root, {"proc/self/cgroup": "0::/", "proc/self/mountinfo": f"30 20 0:26 / {root}/cg rw - cgroup2 none rw"})
        assert detect_machine(root, frozenset(range(8))).threads == threads


def fake_compiler(folder: Path, name: str, first_line: str) -> None:
    program = folder / name
    program.write_text(f"#!/bin/sh\necho '{first_line}'\n")
    program.chmod(0o755)


@pytest.fixture
def only(monkeypatch, tmp_path):
    """PATH holds nothing but what the test puts into the folder."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    compilers.find_cxx.cache_clear()
    yield tmp_path
    compilers.find_cxx.cache_clear()


@pytest.mark.parametrize(
    ("name", "line", "kind", "major"),
    [
        ("g++", "g++ (Debian 12.2.0-14+deb12u1) 12.2.0", "g++", 12),
        ("g++-11", "g++-11 (Ubuntu 11.4.0-1ubuntu1~22.04) 11.4.0", "g++", 11),
        ("clang++", "Ubuntu clang version 14.0.0-1ubuntu1.1", "clang++", 14),
    ],
)
def test_compilers_are_recognised(only, name, line, kind, major):
    fake_compiler(only, name, line)
    found = compilers.find_cxx()
    assert (found.kind, found.major, found.identity, found.path) == (kind, major, line, only / name)


def test_a_newer_compiler_is_taken_where_the_first_is_too_old(only):
    fake_compiler(only, "g++", "g++ (GCC) 9.4.0")
    fake_compiler(only, "clang++-15", "clang version 15.0.7")
    assert compilers.find_cxx().path == only / "clang++-15"
    assert [c.usable for c in compilers.installed_cxx()] == [False, True]


def test_old_compilers_are_named_in_the_refusal(only):
    fake_compiler(only, "g++", "g++ (GCC) 9.4.0")
    with pytest.raises(HetcompError, match=r"g\+\+ is version 9.*apt-get install g\+\+"):
        compilers.find_cxx()


def test_cxx_decides_alone(only, monkeypatch):
    fake_compiler(only, "g++", "g++ (GCC) 13.1.0")
    monkeypatch.setenv("CXX", str(only / "absent"))
    with pytest.raises(HetcompError, match="CXX="):
        compilers.find_cxx()


def test_what_is_no_compiler_is_not_taken_for_one(only, monkeypatch):
    fake_compiler(only, "true", "true (GNU coreutils) 9.1")
    monkeypatch.setenv("CXX", str(only / "true"))
    with pytest.raises(HetcompError, match="CXX="):
        compilers.find_cxx()


def test_asking_for_gpus_never_fails():
    driver = detect_gpus()
    assert driver.state
    assert all(gpu.memory_bytes > 0 for gpu in driver.gpus)


def _unmeasured(name: str, cc: tuple[int, int], **more: float) -> Gpu:
    return Gpu(name=name, memory_bytes=1 << 34, compute_capability=cc, source=Source.DATA_SHEET, **more)


def test_a_gpu_that_ships_has_its_data_sheet():
    gpu = completed(_unmeasured("NVIDIA GeForce RTX 4090", (8, 9)), 128, 0, None)
    assert (gpu.gb_per_s, gpu.link_gb_per_s) == (1008, 31.5)
    assert {rate.weight_format for rate in gpu.rates} >= {"bf16", "fp8"}


def test_another_gpu_has_estimates(tmp_path):
    plain = _unmeasured("NVIDIA RTX A6000", (8, 6), gb_per_s=768.0)
    gpu = completed(plain, 84, 1_800_000, "0000:65:00.0", tmp_path)
    assert gpu.link_gb_per_s == 15.8  # nothing is known of its link
    (rate,) = gpu.rates
    assert rate.source is Source.ESTIMATE and rate.tflops == pytest.approx(84 * 1.8e9 * 512 / 1e12)
    device = tmp_path / "0000:65:00.0"
    device.mkdir()
    (device / "max_link_speed").write_text("16.0 GT/s PCIe\n")
    (device / "max_link_width").write_text("8\n")
    assert completed(plain, 84, 0, "0000:65:00.0", tmp_path).link_gb_per_s == pytest.approx(8 * 1.969)
    (device / "max_link_width").write_text("Unknown\n")
    assert completed(plain, 84, 0, "0000:65:00.0", tmp_path).link_gb_per_s == 15.8


def test_a_detected_gpu_can_be_planned_for():
    gpu = completed(_unmeasured("NVIDIA RTX A6000", (8, 6), gb_per_s=768.0), 84, 1_800_000, None)
    assert gpu_tflops(gpu, "q4") > 0 and link_gb_per_s(gpu) > 0
