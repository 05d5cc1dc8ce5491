"""An artifact on an NVMe disk with a sector that cannot be read: requests are refused with a sentence, others go on,
and nothing is left of it when the file has been written anew.

The disk is qemu's, its failing sector blkdebug's; the driver, the file system and their errors are Linux's own.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

import hetcomp
from tests.e2e import virtual_machine
from tests.e2e.virtual_machine import Disk
from tests.reference import tiny_models
from tests.reference.optimisation import optimised
from tests.reference.plan_builder import avx2_machine

ROOT = Path(__file__).parents[2]
IDS = [5, 6, 7, 8, 9, 10, 11, 12]
WEIGHT = "model.layers.1.self_attn.o_proj.weight"  # that every step reads
IO = 11  # HETCOMP_IO

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("HETCOMP_SKIP_QEMU") == "1", reason="HETCOMP_SKIP_QEMU=1"),
]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unreadable")
    tiny_models.save_tiny("qwen3_moe", folder / "model", num_hidden_layers=2, hidden_size=128)
    with optimised("-O0"):  # what is read is looked at
        hetcomp.compile(folder / "model", avx2_machine(1), formats="f32", context_length=64, out=folder / "artifact")
    return folder / "artifact"


@pytest.fixture(scope="module")
def bad_page(artifact) -> tuple[str, int]:
    """A file of the artifact and a multiple of 4,096 within the weight that has no other weight in its page."""
    weights = json.loads((artifact / "manifest.json").read_text())["weights"]
    (weight,) = [w for w in weights if w["name"] == WEIGHT]
    page = -(-weight["offset"] // 4096) * 4096
    assert page + 4096 <= weight["offset"] + weight["bytes"], "the weight has no page of its own"
    return weight["file"], page


@pytest.fixture(scope="module")
def console(artifact, bad_page, tmp_path_factory) -> str:
    missing = virtual_machine.needs_preparation()
    if missing is not None:
        pytest.fail(missing)
    folder = tmp_path_factory.mktemp("guest")
    file, page = bad_page
    disk = Disk.of_folder(artifact, Path("artifact"), folder / "disk")
    disk = disk.with_bad_sector((artifact / file).read_bytes()[page : page + 4096])
    init = folder / "init"
    command = ["g++", "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-o", init]
    command += [Path(__file__).with_name("unreadable_disk_guest.cpp"), f"-I{ROOT / 'runtime_lib' / 'include'}"]
    command += [f"-L{artifact / 'lib'}", "-lhetcomp_runtime", "-Wl,-rpath,/artifact/lib"]
    subprocess.run(command, check=True)
    files = {
        **virtual_machine.folder_files(artifact, Path("artifact")),
        **virtual_machine.libraries([artifact / "bin" / "hetcomp-run", artifact / "kernels" / "lib_avx2.so"]),
        "init": init,
        "ids": " ".join(map(str, IDS)).encode(),
        "file": file.encode(),
    }
    seen = virtual_machine.boot(files, folder / "image", timeout=300, disk=disk)
    assert "done" in seen.splitlines(), f"the guest did not come to its end:\n{seen[-3000:]}"
    return seen


def _said(console: str, name: str) -> str:
    (line,) = [line for line in console.splitlines() if line.startswith(f"{name} ")]
    return line.partition(" ")[2].strip()


def test_steps_are_refused_by_weight_file_and_byte(console, bad_page):
    file, page = bad_page
    for name in ("first", "second"):
        status, _, sentence = _said(console, name).partition(" ")
        assert int(status) == IO
        assert sentence.startswith(f"The weight {WEIGHT} in /disk/artifact/{file} could not be read at byte {page}")
        assert _said(console, f"{name}-length") == "0"


def test_loads_that_read_the_sector_are_refused(console, bad_page):
    for name in ("in-memory", "verified"):
        status, _, sentence = _said(console, name).partition(" ")
        assert int(status) == IO
        assert bad_page[0] in sentence and "Input/output error" in sentence, sentence
    assert _said(console, "mapped") == "0", "without a hash to compare nothing of it was read"
    assert _said(console, "exit") not in ("0", "-7"), "neither well nor by a signal"


def test_other_models_go_on_and_a_file_that_is_written_anew_is_right(console, artifact):
    assert _said(console, "good") == _said(console, "mended") == "0"
    assert _said(console, "mended-length") == str(len(IDS))
    assert _said(console, "mended-logits") == _said(console, "good-logits")
    assert len(set(_said(console, "good-logits").split())) > 100
