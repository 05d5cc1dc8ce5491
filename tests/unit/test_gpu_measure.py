"""The GPU probe and its reader, on a libcuda.so.1 that has no GPU (tests/reference/fake_cuda.cpp)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hetcomp.errors import HetcompError
from hetcomp.hardware.compilers import find_cxx
from hetcomp.hardware.figures import Gpu, Source
from hetcomp.hardware.gpus import GpuDriver
from hetcomp.profiler import gpu_measure

REPOSITORY = Path(__file__).resolve().parents[2]
PROBE = REPOSITORY / "codegen_templates" / "probe"


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    return gpu_measure.build_probe(folder)


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """The folder that holds the fake driver."""
    folder = tmp_path_factory.mktemp("driver")
    source = REPOSITORY / "tests" / "reference" / "fake_cuda.cpp"
    command = [str(find_cxx().path), "-std=c++20", "-O3", "-march=native", "-Wall", "-Wextra", "-Werror", "-shared"]
    command += ["-fPIC", f"-I{PROBE}", str(source), "-o", str(folder / "libcuda.so.1")]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture
def machine(monkeypatch, probe, fake):
    """``machine(count=1, **settings)``: a machine with that many fake GPUs, the fake's settings in the environment."""

    def make(count=1, **settings: str):
        monkeypatch.setenv("LD_LIBRARY_PATH", str(fake))
        monkeypatch.setenv("FAKE_CUDA_DEVICES", str(count))
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        known = Gpu(name="shown", memory_bytes=1 << 30, compute_capability=(8, 9), source=Source.DATA_SHEET)
        monkeypatch.setattr(gpu_measure, "detect_gpus", lambda: GpuDriver("usable", gpus=(known,) * count))
        monkeypatch.setattr(gpu_measure, "build_probe", lambda folder: probe)

    return make


def measured():
    return gpu_measure.measure_gpu_figures(quick=True)


def run(probe, *arguments: str):
    done = subprocess.run([probe, *arguments], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout


def test_without_warnings_for_both_compilers(tmp_path):
    for name in ("g++", "clang++"):
        if shutil.which(name):
            flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
            subprocess.run([name, *flags, str(PROBE / "gpu_probe.cpp")], check=True)


def test_every_figure_of_every_gpu(machine):
    machine(count=2)
    told = []
    found = gpu_measure.measure_gpu_figures(told.append, quick=True)
    assert [gpu.name for gpu in found.gpus] == ['Fake "GPU" 0', "Fake GPU 1"]
    gpu = found.gpus[0]
    assert gpu.source is Source.MEASURED
    assert gpu.compute_capability == (8, 9)
    assert gpu.free_bytes == 192 << 20
    assert gpu.memory_bytes == 384 << 20
    assert [point.bytes for point in gpu.copies] == [4096, 65536, 1 << 20, 16 << 20]
    assert gpu.link_gb_per_s == gpu.copies[-1].to_device_gb_per_s
    assert gpu.gb_per_s and gpu.handshake_us and gpu.joint_gb_per_s
    assert gpu.launch_us == pytest.approx(1.0, rel=0.5)
    assert [rate.weight_format for rate in gpu.rates] == ["bf16", "int8"]
    assert len(found.samples["gpus.1.gb_per_s"]) == 3
    assert "mma.sync" in found.references["gpus.0.rates.0.tflops"]
    assert any("largest copies" in note for note in found.notes)
    assert found.documents[0]["bf16"]["error"] < 1e-4
    assert found.documents[0]["int8"]["error"] == 0
    assert any("GPU 1" in text for text in told)


@pytest.mark.parametrize(
    ("call", "lost"),
    [
        ("cuGraphAddBatchMemOpNode", ["handshake_us"]),
        ("cuGraphAddKernelNode_v2", ["launch_us"]),
        pytest.param("cuMemsetD32Async", ["gb_per_s", "rates"], marks=pytest.mark.exhaustive),
        ("cuFuncSetAttribute", ["rates"]),
        pytest.param("cuMemHostGetDevicePointer_v2", ["handshake_us"], marks=pytest.mark.exhaustive),
        pytest.param("cuGraphLaunch", ["handshake_us", "launch_us"], marks=pytest.mark.exhaustive),
        ("cuMemcpyDtoHAsync_v2", ["copies", "gb_per_s", "link_gb_per_s", "rates"]),
        ("cuEventElapsedTime", ["copies", "gb_per_s", "launch_us", "link_gb_per_s", "rates"]),
    ],
)
def test_a_failing_call_costs_its_figures_alone(machine, call, lost):
    machine(FAKE_CUDA_FAIL=call)
    found = measured()
    figures = ["copies", "gb_per_s", "handshake_us", "joint_gb_per_s", "launch_us", "link_gb_per_s", "rates"]
    assert [name for name in figures if not getattr(found.gpus[0], name)] == lost
    assert any(f"{call} failed with CUDA error 999 (CUDA_ERROR_UNKNOWN)." in note for note in found.notes)


@pytest.mark.parametrize("call", ["cuStreamCreate", "cuCtxSetCurrent", "cuDevicePrimaryCtxRetain"])
def test_without_a_context_nothing_is_known_but_the_device(machine, call):
    machine(FAKE_CUDA_FAIL=call)
    found = measured()
    assert found.gpus[0].name == 'Fake "GPU" 0'
    assert found.gpus[0].free_bytes is None
    assert not found.samples
    assert any(f"no context: {call} failed" in note for note in found.notes)


def test_a_device_without_a_name_stays_what_the_driver_says(machine):
    machine(FAKE_CUDA_FAIL="cuDeviceGetName")
    found = measured()
    assert found.gpus[0].name == "shown"
    assert found.gpus[0].source is Source.DATA_SHEET
    assert any("cuDeviceGetName failed" in note for note in found.notes)


@pytest.mark.parametrize(
    ("kernel", "lost", "said"), [("read_sum", "gb_per_s", "wrong sum"), ("gemm", "rates", "products are wrong")]
)
def test_a_kernel_that_computes_nonsense_gives_no_figure(machine, kernel, lost, said):
    machine(FAKE_CUDA_WRONG=kernel)
    found = measured()
    assert not getattr(found.gpus[0], lost)
    assert found.gpus[0].handshake_us
    assert any(said in note for note in found.notes)


def test_a_gpu_that_never_answers_is_given_up(machine):
    machine(FAKE_CUDA_HANG="1", HETCOMP_GPU_STEP_SECONDS="0.3")
    found = measured()
    assert found.gpus[0].free_bytes == 192 << 20
    assert not found.gpus[0].copies
    assert found.gpus[0].handshake_us is None
    assert any("did not answer within 0.3 s" in note for note in found.notes)
    assert any("had stopped answering" in note for note in found.notes)


def test_a_probe_that_says_nothing_or_hangs_is_noted(machine, monkeypatch):
    machine()
    monkeypatch.setattr(gpu_measure, "_probe_command", lambda *_: ["sh", "-c", "echo out of order >&2; exit 3"])
    assert "failed with status 3: out of order" in measured().notes[0]
    monkeypatch.setattr(gpu_measure, "_probe_command", lambda *_: ["sleep", "10"])
    monkeypatch.setattr(gpu_measure, "PROBE_SECONDS", 0.1)
    found = measured()
    assert "did not end within" in found.notes[0]
    assert found.gpus[0].name == "shown"


def test_without_a_driver_or_a_gpu_there_is_nothing(monkeypatch, probe, fake):
    monkeypatch.setattr(gpu_measure, "detect_gpus", lambda: GpuDriver("absent"))
    assert gpu_measure.measure_gpus() == ()
    monkeypatch.setenv("LD_LIBRARY_PATH", str(fake))
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "-1")
    status, text = run(probe, "count")
    assert (status, json.loads(text)) == (0, {"devices": 0, "warnings": []})
    status, text = run(probe, "measure", "0", "64", "0")
    assert status == 1
    assert "There is no such device" in text


def test_parts_that_are_no_figures_are_left_out():
    document = {
        "name": "G",
        "memory_bytes": 1,
        "compute_capability": [9, 0],
        "copies": [{"bytes": 4096, "to_device_gb_per_s": -1, "to_host_gb_per_s": 1}],
        "reads": {"gb_per_s": 0, "samples": []},
        "bf16": {"tflops": "fast", "samples": []},
        "handshake": {"us": float("nan"), "samples": []},
        "joint": [],
    }
    notes = []
    gpu = gpu_measure.parse(document, 0, notes.append).gpu
    assert (gpu.copies, gpu.gb_per_s, gpu.rates, gpu.handshake_us, gpu.joint_gb_per_s) == ((), None, (), None, None)
    assert len(notes) == 5
    with pytest.raises(HetcompError, match="compute_capability"):
        gpu_measure.parse({"name": "G", "memory_bytes": 1}, 0, notes.append)
    with pytest.raises(HetcompError, match="no valid figures"):
        gpu_measure.parse({**document, "compute_capability": "new"}, 0, notes.append)


def test_torch_goes_before_our_kernel():
    points = [{"size": size, "rate": 10.0 * size, "samples": [9.0, 10.0 * size], "us": 1.0} for size in (1, 16)]
    names = ("linear", "attention_decode", "attention_prefill")
    document = {"torch": "2.11", "name": "G", **dict.fromkeys(names, points)}
    base = {"name": "G", "memory_bytes": 1, "compute_capability": [9, 0]}
    base |= {form: {"tflops": t, "samples": [t]} for form, t in (("bf16", 1.0), ("int8", 2.0))}
    found = gpu_measure.merge_torch(gpu_measure.parse(base, 0, print), document)
    assert [(r.weight_format, r.tflops) for r in found.gpu.rates] == [("bf16", 2 * 16 * 160 * 1e-3), ("int8", 2.0)]
    assert found.references["rates.0.tflops"] == "torch 2.11: matmul, 16 rows"
    assert found.samples["rates.1.tflops"] == (2.0,)
    assert [(c.kernel, c.isa) for c in found.gpu.curves] == [(name, "sm_90") for name in names]
    with pytest.raises(ValueError, match="another GPU"):
        gpu_measure.merge_torch(found, {**document, "name": "H"})


def test_the_kernels_assemble_where_there_is_an_assembler(probe, tmp_path):
    ptxas = shutil.which("ptxas")
    if ptxas is None:
        pytest.skip("no ptxas")
    for kernel in ("basic", "bf16", "bf16-2", "int8", "int8-2"):
        (tmp_path / "k.ptx").write_text(run(probe, "ptx", kernel)[1])
        for target in ("sm_80", "sm_89", "sm_90", "sm_120"):
            command = [ptxas, f"-arch={target}", "-o", os.devnull, str(tmp_path / "k.ptx")]
            subprocess.run(command, check=True)
