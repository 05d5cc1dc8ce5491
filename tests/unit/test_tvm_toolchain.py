"""What the TVM backend promises about its objects and about the installed TVM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hetcomp.backends.protocol import Isa, KernelRequest
from hetcomp.backends.tvm import TvmBackend, support_source
from hetcomp.backends.tvm_toolchain import TVM_VERSION, check_versions
from hetcomp.errors import HetcompError
from hetcomp.ir import ops
from hetcomp.ir.types import DType
from tests.reference.tvm_harness import machine_isas, request, value
from tests.sampled_cases import rest

HOOK = "TVMFFIErrorSetRaisedFromCStrParts"
LIBC = {"memcpy", "memset", "memmove", "cosf", "sinf", "sincosf"}


def _requests(isa: Isa) -> list[KernelRequest]:
    x, y = value("x", ("T", 96)), value("y", ("T", 96))
    table = [value("c", ("T", 16)), value("s", ("T", 16))]
    routed = [value("i", ("T", 6), DType.I32), value("w", ("T", 6))]
    return [
        request(ops.RmsNorm(96, 1e-6), [x, value("w", (96,))], [y], isa),
        request(ops.RopeTable(32), [value("p", ("T",), DType.I32), value("f", (16,))], table, isa),
        request(ops.Rope(3, 32, 32), [value("x", ("T", 3, 32)), *table], [value("y", ("T", 3, 32))], isa),
        request(ops.Route(512, 6, "softmax", True), [value("l", ("T", 512))], routed, isa),
        request(ops.Glu(96, "gelu_tanh"), [x, x], [y], isa),
        request(ops.Activation("gelu"), [x], [y], isa),
        request(ops.Concat(), [value("a", ("T", 40)), value("b", ("T", 56))], [y], isa),
    ]


@pytest.mark.parametrize("isa", [machine_isas()[-1], *rest(machine_isas()[:-1])])
def test_objects_leave_nothing_open_but_libc_libm_and_the_error_hook(isa: Isa, tmp_path: Path):
    backend = TvmBackend()
    for ask in _requests(isa):
        for name, data in backend.emit(ask).objects:
            (tmp_path / name).write_bytes(data)
            done = subprocess.run(["nm", str(tmp_path / name)], capture_output=True, text=True, check=True)
            rows = [line.split() for line in done.stdout.splitlines()]
            open_symbols = {row[-1] for row in rows if row[-2] == "U"}
            assert open_symbols <= LIBC | {HOOK}
            assert not [row for row in rows if row[-1].startswith("__TVMBackend")], "calls TVM's allocator"


def test_the_support_source_defines_the_hook_once():
    assert support_source().count(f'extern "C" void {HOOK}(') == 1


def test_emission_is_deterministic_across_processes():
    """Another process with another hash seed emits the same names, sources and object bytes."""
    script = (
        "import hashlib\n"
        "from tests.unit.test_tvm_toolchain import _requests\n"
        "from hetcomp.backends.tvm import TvmBackend\n"
        "from hetcomp.backends.protocol import Isa\n"
        "for ask in _requests(Isa.AVX2)[:3]:\n"
        "    print(hashlib.sha256(repr(TvmBackend().emit(ask)).encode()).hexdigest())\n"
    )
    root = Path(__file__).parents[2]
    seen = {
        subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
            cwd=root,
            env={"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin"},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1 and len(seen.pop().splitlines()) == 3


def test_equal_requests_share_code_and_different_ones_do_not():
    backend = TvmBackend()
    isa = machine_isas()[0]
    ins, outs = [value("x", ("T", 96)), value("w", (96,))], [value("y", ("T", 96))]
    a = backend.emit(request(ops.RmsNorm(96, 1e-6), ins, outs, isa, origin="model.layers.0.norm"))
    b = backend.emit(request(ops.RmsNorm(96, 1e-6), ins, outs, isa, origin="model.layers.7.norm"))
    c = backend.emit(request(ops.RmsNorm(96, 1e-5), ins, outs, isa))
    assert a is b
    assert a.name != c.name and a.objects != c.objects


def test_importing_the_backend_imports_neither_tvm_nor_torch():
    script = "import sys, hetcomp.backends.tvm; print('tvm' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_kinds_of_others_are_left_to_others():
    ask = request(
        ops.Embed(10, 8),
        [value("i", ("T",), DType.I32), value("w", (10, 8))],
        [value("y", ("T", 8))],
        Isa.AVX2,
    )
    assert TvmBackend().score(ask) == 0
    with pytest.raises(HetcompError, match=r"no kernel for 'embed' at model\.layers\.0\.test"):
        TvmBackend().emit(ask)


@pytest.mark.parametrize(
    ("tvm_version", "ffi_version", "words"),
    [
        (None, None, "apache-tvm is not installed"),
        ("0.26.0", "0.1.14.post1", "apache-tvm is version 0.26.0"),
        (TVM_VERSION, "0.1.15.post2", "apache-tvm-ffi is version 0.1.15.post2"),
        (TVM_VERSION, "0.2.0", "apache-tvm-ffi is version 0.2.0"),
        (TVM_VERSION, None, "apache-tvm-ffi is version absent"),
    ],
)
def test_an_unusable_tvm_is_named_with_the_remedy(tvm_version: str | None, ffi_version: str | None, words: str):
    with pytest.raises(HetcompError, match=words) as caught:
        check_versions(tvm_version, ffi_version)
    assert "pip install apache-tvm==0.27.0.post1 apache-tvm-ffi==0.1.14.post1" in str(caught.value)


def test_the_supported_pair_is_accepted():
    check_versions(TVM_VERSION, "0.1.14.post1")
