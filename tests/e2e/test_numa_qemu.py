"""A two-node artifact on a kernel with two NUMA nodes: every slice on its node, and the numbers of the one-node run.

The kernel is Debian's, booted under qemu's software emulation (AVX2, no virtualisation needed).
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hetcomp
from tests.e2e import virtual_machine
from tests.reference import tiny_models
from tests.reference.optimisation import optimised
from tests.reference.plan_builder import avx2_machine

ROOT = Path(__file__).parents[2]
IDS = [5, 6, 7, 8, 9, 10, 11, 12, 200, 3, 77, 31]
GREEDY = 12  # tokens that numa_guest.cpp lets hetcomp-run generate after the first four ids
NODES = {0, 1}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("HETCOMP_SKIP_QEMU") == "1", reason="HETCOMP_SKIP_QEMU=1"),
]


@dataclass(frozen=True)
class Guest:
    """What the console showed."""

    console: str

    def lines(self, name: str) -> list[str]:
        """The rest of every line that begins with the word ``name``."""
        found = [line.partition(" ")[2] for line in self.console.splitlines() if line.startswith(f"{name} ")]
        assert found, f"the guest printed no '{name}':\n{self.console[-3000:]}"
        return found

    def document(self, name: str) -> Any:
        """The JSON behind ``name``."""
        return json.loads(self.lines(name)[0])

    def logits(self) -> np.ndarray:
        """Logits of IDS, [tokens, vocabulary]."""
        return np.array(self.lines("logits")[0].split(), np.float32).reshape(len(IDS), -1)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory) -> dict[int, Path]:
    """The same two-layer model compiled for one and for two nodes."""
    folder = tmp_path_factory.mktemp("numa")
    tiny_models.save_tiny(
        "qwen3_moe",
        folder / "model",
        num_hidden_layers=2,
        moe_intermediate_size=96,
        tie_word_embeddings=False,
    )
    with optimised("-O0"):  # where weights lie is looked at
        for nodes in (1, 2):
            hetcomp.compile(
                folder / "model", avx2_machine(nodes), formats="f32", context_length=64, out=folder / f"{nodes}"
            )
    return {nodes: folder / f"{nodes}" for nodes in (1, 2)}


@pytest.fixture(scope="module")
def guest(artifacts, tmp_path_factory) -> Guest:
    missing = virtual_machine.needs_preparation()
    if missing is not None:
        pytest.fail(missing)
    folder, artifact = tmp_path_factory.mktemp("guest"), artifacts[2]
    init = folder / "init"
    source = Path(__file__).with_name("numa_guest.cpp")
    command = ["g++", "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-o", init, source]
    command += [f"-I{ROOT / 'runtime_lib' / 'include'}", f"-L{artifact / 'lib'}", "-lhetcomp_runtime"]
    subprocess.run([*command, "-Wl,-rpath,/artifact/lib"], check=True)
    files = {
        **virtual_machine.folder_files(artifact, Path("artifact")),
        **virtual_machine.libraries([artifact / "bin" / "hetcomp-run", artifact / "kernels" / "lib_avx2.so"]),
        "init": init,
        "ids": " ".join(map(str, IDS)).encode(),
    }
    seen = Guest(virtual_machine.boot(files, folder / "image", timeout=300))
    assert "done" in seen.console.splitlines(), f"the guest did not come to its end:\n{seen.console[-3000:]}"
    return seen


def _check_places(report: list[dict[str, Any]]) -> None:
    for weight in report:
        wrong = weight["elsewhere"] or weight["absent"] or weight["on_node"] != weight["pages"]
        assert not wrong and weight["machine_node"] == weight["node"], weight
    cut = [weight for weight in report if "@" in weight["weight"]]
    assert {weight["node"] for weight in cut} == NODES
    for weight in cut:
        assert weight["weight"].endswith(f"@{weight['node']}")
    assert all(weight["node"] == 0 for weight in report if "@" not in weight["weight"])


def test_every_slice_lies_on_its_node(guest):
    report = guest.document("report")
    _check_places(report)
    bytes_of = {node: sum(w["bytes"] for w in report if w["node"] == node) for node in NODES}
    assert {"0", "1"} == set(guest.lines("bound")) - {"end"}, "first touch put them there, not mbind"
    nodes = guest.document("stats")["nodes"]
    assert [(n["machine_node"], n["threads"], n["weight_bytes"]) for n in nodes] == [
        (0, 2, bytes_of[0]),
        (1, 1, bytes_of[1]),
    ]
    experts = {w["weight"]: w["bytes"] for w in report if ".1.mlp.experts" in w["weight"]}
    for name in ("gate_up_proj", "down_proj"):
        first, second = (experts[f"model.layers.1.mlp.experts.{name}@{node}"] for node in (0, 1))
        assert first == 2 * second  # 64 and 32 of 96 columns
    print(f"\nbytes on node 0: {bytes_of[0]}, on node 1: {bytes_of[1]}; no page elsewhere")


def test_lanes_are_bound_to_their_nodes(guest):
    # Lane 0 is the calling thread, bound within a step only.
    assert sorted(guest.lines("lane")) == ["0-1", "2"]
    assert guest.document("stats")["notes"] == []


def test_numbers_are_those_of_one_node(guest, artifacts):
    got = guest.logits()
    here = hetcomp.load(artifacts[2])
    assert "this machine offers 1" in here.stats["notes"][0] or len(here.stats["nodes"]) == 2
    largest = np.abs(got).max()
    # The same code in the same order: nothing but the C library's exp may differ between the two CPUs.
    same = np.abs(got - here(IDS)).max() / largest
    # Two sums of 96 products instead of one, in two layers: some roundings of 2^-24 fall differently, and the norms
    # behind them pass errors on about as large as they are. A wrong or lost slice gives an error of order 1.
    one = np.abs(got - hetcomp.load(artifacts[1])(IDS)).max() / largest
    print(f"\nlogits up to {largest:.2f}; off by {same:.1e} from this machine, by {one:.1e} from one node (relative)")
    assert same < 1e-6
    assert one < 100 * 2.0**-24


def test_greedy_ids_are_those_of_one_node(guest, artifacts):
    tokens = hetcomp.load(artifacts[1]).generate(IDS[:4], max_new_tokens=GREEDY, ignore_eos=True)
    want = ",".join(str(token.id) for token in tokens)
    assert want in guest.console.splitlines()
    assert guest.lines("exit") == ["0"]


def test_hetcomp_run_prints_the_report(guest):
    rows = [line.split("\t") for line in guest.console.splitlines() if line.count("\t") == 6]
    assert rows[0][0] == "weight" and len(rows) == 1 + len(guest.document("report"))
    assert all(row[2] == row[3] and row[5:] == ["0", "0"] for row in rows[1:])


def test_where_mbind_is_refused_first_touch_does_it_and_a_note_says_so(guest):
    notes = guest.document("unbound-stats")["notes"]
    assert len(notes) == 1 and "mbind" in notes[0] and "CAP_SYS_NICE" in notes[0]
    assert guest.lines("unbound") == ["end"]
    _check_places(guest.document("unbound-report"))


def test_one_node_artifact_knows_nothing_of_nodes(artifacts):
    program = (artifacts[1] / "kernels" / "src" / "avx2" / "program.cpp").read_text()
    assert "lane.own" not in program and "add_partials" not in program
    manifest = json.loads((artifacts[1] / "manifest.json").read_text())
    assert manifest["nodes"] == [0] and {w["node"] for w in manifest["weights"]} == {0}
