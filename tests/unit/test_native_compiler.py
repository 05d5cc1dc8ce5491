"""Objects that g++ makes behind a precompiled header are those that it makes without."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from hetcomp.backends import native_compiler
from hetcomp.backends.native_compiler import Source, compile_objects
from hetcomp.backends.protocol import Isa
from hetcomp.errors import HetcompError
from hetcomp.hardware.compilers import find_cxx
from hetcomp.installed_runtime import include

KERNEL = """#include <immintrin.h>
#include <algorithm>

namespace {
float longest(const float* x, long n) {
  float most = 0;
  for (long i = 0; i < n; ++i) most = std::max(most, x[i]);
  return most;
}
}  // namespace

extern "C" float largest(const float* x, long n) {
  return n < 8 ? longest(x, n) : _mm256_cvtss_f32(_mm256_loadu_ps(x));
}
"""

CONTRACT = """#include "hetcomp/kernel.h"

namespace hetcomp {
void copy(Lane& lane, const KernelArgs& args) {
  const auto* x = static_cast<const float*>(args.in[0]);
  auto* y = static_cast<float*>(args.out[0]);
  parallel_for(lane, args.rows, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) y[i] = x[i];
  });
}
}  // namespace hetcomp
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HETCOMP_CACHE", str(tmp_path))
    return tmp_path


def compiled(isa: Isa = Isa.AVX2, text: str = KERNEL) -> bytes:
    (path,) = compile_objects([Source("largest", text)], isa, include(), threads=1)
    return path.read_bytes()


needs_gcc = pytest.mark.skipif(find_cxx().kind != "g++", reason="clang++ compiles without")


@needs_gcc
@pytest.mark.parametrize("text", [KERNEL, CONTRACT, KERNEL.partition("\n")[0] + "\n" + CONTRACT])
def test_objects_are_the_same_with_and_without(text: str, cache: Path, monkeypatch: pytest.MonkeyPatch):
    behind = compiled(text=text)
    assert len(list((cache / "headers").glob("*.gch"))) == 1
    shutil.rmtree(cache / "objects")
    monkeypatch.setattr(native_compiler, "precompiled_header", lambda *_: ())
    assert compiled(text=text) == behind


@needs_gcc
def test_a_changed_contract_has_a_header_of_its_own(cache: Path):
    """g++ would take the old one without a word."""
    compiled(text=CONTRACT)
    changed = Path(shutil.copytree(include(), cache / "include"))
    compile_objects([Source("copy", CONTRACT)], Isa.AVX2, changed, threads=1)
    kernel = changed / "hetcomp" / "kernel.h"
    kernel.write_text(kernel.read_text().replace("namespace hetcomp {", "namespace hetcomp {\n#error changed", 1))
    with pytest.raises(HetcompError, match="changed"):
        compile_objects([Source("copy", CONTRACT)], Isa.AVX2, changed, threads=1)


@needs_gcc
def test_each_instruction_set_has_a_header_and_what_is_cached_needs_none(cache: Path):
    compiled()
    shutil.rmtree(cache / "headers")
    compiled()
    assert not (cache / "headers").exists()
    compiled(Isa.AVX512)
    compiled(Isa.AVX_VNNI)
    assert len(list((cache / "headers").glob("*.gch"))) == 2
    compiled(text='extern "C" int one() { return 1; }\n')
    assert len(list((cache / "headers").glob("*.gch"))) == 2


@needs_gcc
def test_without_room_for_the_header_the_object_is_made(cache: Path):
    (cache / "headers").write_text("a file where the folder should be")
    assert compiled()


@needs_gcc
def test_what_no_compiler_takes_is_reported_for_the_source_and_not_for_its_header(cache: Path):
    with pytest.raises(HetcompError, match=r"could not compile the generated kernel largest .*nowhere\.h"):
        compiled(text="#include <immintrin.h>\n#include <nowhere.h>\n")
    assert not list((cache / "headers").glob("*.gch*"))
    Path(tempfile.gettempdir(), "hetcomp-failed-largest.cpp").unlink(missing_ok=True)
