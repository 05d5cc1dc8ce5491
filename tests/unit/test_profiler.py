"""The profiler: rounds of memory readings, curves and what follows from them, and that nothing is half-written."""

from __future__ import annotations

import errno
import json
import os
import time
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hetcomp.backends.cpu_isa import cpu_isa
from hetcomp.backends.protocol import Isa
from hetcomp.cli.main import app
from hetcomp.errors import HetcompError
from hetcomp.hardware import measure
from hetcomp.hardware.detect import Machine, NodeFacts, detect_machine
from hetcomp.hardware.figures import Cache, Disk, KernelCurve, KernelPoint, Source
from hetcomp.hardware.profile import KIN, HardwareProfile, load_profile, parse_profile
from hetcomp.passes.context import FORMATS
from hetcomp.profiler import disk, kernel_curves, measure_machine, memory
from hetcomp.profiler.kernel_cases import CurvePlan, Detail, bytes_a_weight, curve_plans, stream_bytes
from hetcomp.profiler.memory import MemoryRounds, Mode, Task
from tests.sampled_cases import rest
from tests.unit.test_hardware_detect import two_sockets

GIB = 1 << 30


def machine(**changes: object) -> Machine:
    """Two nodes of two cores, and one without cores (a memory expander)."""
    facts: dict = dict(
        cpu="a CPU",
        isas=("avx2", "avx512"),
        nodes=(
            NodeFacts(0, (0, 1), (0, 1), 8 * GIB, 4 * GIB, (10, 21, 30)),
            NodeFacts(1, (2, 3), (2, 3), 8 * GIB, 4 * GIB, (21, 10, 30)),
            NodeFacts(4, (), (), 8 * GIB, 4 * GIB, (30, 30, 10)),
        ),
        caches=(
            Cache(level=2, type="unified", bytes=1 << 20, instances=4),
            Cache(level=3, type="unified", bytes=32 << 20, instances=2),
        ),
        threads=4,
        logical_cpus=4,
        quota=None,
        memory_limit=None,
        huge_pages="madvise",
    )
    return Machine(**{**facts, **changes})


class FakeProbe:
    """Answers tasks with rising or falling bandwidth from run to run; remembers them."""

    def __init__(self, *bests: float) -> None:
        self.tasks: list[Task] = []
        self._bests = bests or (40.0,)

    def __call__(self, task: Task) -> dict[int, list[float]]:
        number = sum(t.mode is task.mode and t.cpus == task.cpus for t in self.tasks)
        self.tasks.append(task)
        best = self._bests[number % len(self._bests)]
        if task.mode is Mode.READ:
            return {1: [best / 2 - 1, best / 2], 2: [best, best - 2]}
        if task.mode is Mode.ALL:
            return {2: [best / 4, best / 5]}
        return {2: [0.5, 0.3]} if task.mode is Mode.BARRIER else {1 << 20: [90.0], 1 << 21: [100.0], 1 << 22: [50.0]}


def curve(kernel: str, isa: str, form: str, points: dict[int, float], variant: str = "dram") -> KernelCurve:
    return KernelCurve(
        kernel=kernel,
        variant=variant,
        isa=isa,
        weight_format=form,
        shape={},
        points=tuple(KernelPoint(size=s, rate=r, samples=(r,)) for s, r in points.items()),
        source=Source.MEASURED,
    )


def test_a_figure_is_the_median_of_the_best_of_each_round():
    probe = FakeProbe(40.0, 60.0, 50.0)
    rounds = MemoryRounds(machine(), probe)
    for _ in range(3):
        rounds.measure()
    figures = rounds.figures()
    assert [(p.threads, p.gb_per_s) for p in figures.reads[1]] == [(1, 25.0), (2, 50.0)]
    assert figures.barrier_us == 0.3
    assert len(figures.samples[Mode.READ, 0, 0, 2]) == 6
    assert "node 0 scattered by 40 %" in figures.scatter
    # 1 MiB cannot be slower than 2 MiB: something held that reading up.
    assert [(p.bytes >> 20, p.gb_per_s) for p in figures.cached] == [(1, 100.0), (2, 100.0), (4, 50.0)]
    assert not figures.remote
    calm = MemoryRounds(machine(), FakeProbe(40.0, 44.0))
    calm.measure()
    calm.measure()
    assert calm.figures().scatter == ""


def test_remote_reads_are_of_every_other_node():
    probe = FakeProbe()
    rounds = MemoryRounds(machine(), probe)
    rounds.measure(remote=True)
    far = [(t.cpus, t.memory, t.touch) for t in probe.tasks if t.mode is Mode.ALL]
    assert far == [((0, 1), 1, (2, 3)), ((0, 1), 4, ()), ((2, 3), 0, (0, 1)), ((2, 3), 4, ())]
    assert {id: [r.memory for r in found] for id, found in rounds.figures().remote.items()} == {0: [1, 4], 1: [0, 4]}


def test_distances_are_those_of_the_nodes_that_are_there(tmp_path):
    root = two_sockets(tmp_path)
    nodes = root / "sys/devices/system/node"
    (nodes / "node7").mkdir()  # neither CPUs nor memory: left out
    for node, text in ((0, "10 21 40"), (1, "21 10 40"), (7, "40 40 10")):
        (nodes / f"node{node}/distance").write_text(text + "\n")
    found = detect_machine(root, frozenset(range(8))).nodes
    assert [node.distances for node in found] == [(10, 21), (21, 10)]


def test_the_buffer_is_larger_than_the_caches_but_leaves_the_memory_alone():
    roomy = machine(nodes=(NodeFacts(0, (0,), (0,), 64 * GIB, 60 * GIB),))
    assert memory.buffer_mebibytes(roomy, roomy.nodes[0]) == 512
    assert memory.sets_mebibytes(roomy, roomy.nodes[0]) == 8 * 64
    large = machine(nodes=roomy.nodes, caches=(Cache(level=3, type="unified", bytes=GIB, instances=1),))
    assert memory.buffer_mebibytes(large, roomy.nodes[0]) == 4 * 1024
    small = machine(nodes=(NodeFacts(0, (0,), (0,), GIB, GIB),))
    assert memory.buffer_mebibytes(small, small.nodes[0]) == 128


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A machine whose probes answer at once; yields the kernels' curves by ISA, which a test may change."""
    curves: dict[str, object] = {
        isa.value: (
            curve("linear", isa.value, "bf16", {1: 15.0, 64: 2.0, 512: 0.4}),
            curve("moe_experts", isa.value, "bf16", {1: 10.0}),
            curve("elementwise", isa.value, "f32", {1: 1.0}, "add"),
        )
        for isa in Isa
    }

    def measured(isa: Isa, *rest: object) -> object:
        if isinstance(curves[isa.value], Exception):
            raise curves[isa.value]
        return curves[isa.value]

    monkeypatch.setenv("HETCOMP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measure_machine, "probe_runner", lambda isa, folder: FakeProbe())
    monkeypatch.setattr(measure_machine, "kernel_curves", measured)
    monkeypatch.setattr(measure_machine, "tune_kernels", lambda *rest: ())
    figure = Disk(path="/", gb_per_s=1.0, source=Source.MEASURED)
    monkeypatch.setattr(measure_machine, "measure_disk", lambda folder: (figure, (1.0, 1.0)))
    return curves


def test_a_profile_of_two_nodes_is_written_and_read_back(fake, tmp_path):
    profile = measure_machine.measure_machine(machine())
    assert profile.measured
    assert [n.distances for n in profile.nodes] == [(10, 21, 30), (21, 10, 30), (30, 30, 10)]
    assert [r.gb_per_s for r in profile.nodes[0].remote_reads] == [10.0, 10.0]
    assert profile.nodes[2].read_bandwidth == ()
    measure.keep(profile, tmp_path / "p.json")
    assert load_profile(str(tmp_path / "p.json")) == profile
    document = json.loads(profile.to_json())
    assert profile.samples
    for path, readings in profile.samples.items():
        figure = document
        for part in path.split("."):
            figure = figure[int(part)] if part.isdigit() else figure[part]
        assert min(readings) <= figure <= max(readings) or path.startswith("cached_reads"), path


def test_rates_follow_from_the_curves():
    curves = [
        curve("linear", "avx2", "bf16", {1: 15.0, 64: 2.0, 512: 0.4}),
        curve("linear", "avx2", "bf16", {1: 99.0, 64: 99.0}, "cache"),
        curve("moe_experts", "avx2", "bf16", {1: 10.0}),
        curve("linear", "avx2", "f32", {1: 12.0, 512: 0.2}),
        curve("elementwise", "avx2", "f32", {1: 1.0}, "add"),
    ]
    rates, peak = kernel_curves.kernel_rates(curves, 2, 40.0)
    assert peak == 48.0  # f32 streamed 12 * 4 GB/s, more than the plain loop
    assert {r.weight_format: (r.gflops_per_core, r.bandwidth_fraction) for r in rates} == {
        "bf16": (pytest.approx(2 * 512 * 0.4 / 2), pytest.approx(30 / 48)),
        "f32": (pytest.approx(2 * 512 * 0.2 / 2), 1.0),
    }


def test_kernels_that_stream_faster_than_plain_reads_are_believed_and_mentioned(fake):
    fake["avx512"] = (curve("linear", "avx512", "bf16", {1: 30.0, 512: 0.4}),)
    profile = measure_machine.measure_machine(machine(), quick=True)
    assert [p.gb_per_s for p in profile.nodes[0].read_bandwidth] == [20.0, 60.0]
    assert "kernels streamed 60.0 GB/s on node 0, plain reads 40.0" in profile.origin


def test_where_an_instruction_set_fails_the_next_weaker_is_measured(fake):
    fake["avx512"] = HetcompError("The kernel probe failed with status -11 in linear_x: no message.")
    with pytest.warns(UserWarning, match=r"status -11 in linear_x.*built without avx512"):
        profile = measure_machine.measure_machine(machine())
    assert {r.isa for r in profile.rates} == {c.isa for c in profile.curves} == {"avx2"}
    assert profile.isas == ("avx2",)  # nor is anything compiled for the one that failed
    fake["avx2"] = fake["avx512"]
    with pytest.warns(UserWarning), pytest.raises(HetcompError, match="no instruction set"):
        measure_machine.measure_machine(machine())


@pytest.mark.parametrize("quick", [True, False])
def test_only_the_best_instruction_set_is_measured(fake, quick):
    fake["avx2"] = HetcompError("not asked for")
    profile = measure_machine.measure_machine(machine(), quick=quick)
    assert {c.isa for c in profile.curves} == {"avx512"}
    assert profile.isas == ("avx2", "avx512")


def test_a_quick_profile_leaves_out_disk_and_remote_memory(fake):
    profile = measure_machine.measure_machine(machine(), quick=True)
    assert profile.disk is None
    assert all(not node.remote_reads for node in profile.nodes)


def test_without_a_compiler_the_figures_are_estimates_and_say_why(monkeypatch, tmp_path):
    refuse_compiler(monkeypatch)
    monkeypatch.setenv("HETCOMP_CACHE", str(tmp_path / "cache"))
    profile = load_profile("auto")
    assert not profile.measured
    assert {rate.source for rate in profile.rates} | {profile.nodes[0].source} == {Source.ESTIMATE}
    assert "No usable C++ compiler" in profile.origin
    assert not (tmp_path / "cache").exists()


def refuse_compiler(monkeypatch):
    def refuse():
        raise HetcompError("No usable C++ compiler: none.")

    monkeypatch.setattr(memory, "find_cxx", refuse)


def test_a_cpu_without_instruction_sets_is_not_measured():
    with pytest.raises(HetcompError, match="none of the instruction sets"):
        measure_machine.measure_machine(machine(isas=()))
    assert measure_machine.estimated_profile(machine(isas=()), "why").rates


_ENDS = (Isa.AVX2, Isa.AMX_BF16)


@cache
def plans_of(isa: Isa, detail: Detail) -> tuple[CurvePlan, ...]:
    """Kernels are rendered for each."""
    return tuple(curve_plans(isa, detail, 512 << 20))


@pytest.mark.parametrize("isa", [*_ENDS, *rest(isa for isa in Isa if isa not in _ENDS)])
def test_curves_of_every_format_have_rising_sizes_and_bounded_memory(isa):
    full, coarse, quick = (plans_of(isa, detail) for detail in Detail)
    for kernel in ("linear", "moe_experts"):
        measured = [p.weight_format for p in (*full, *coarse) if p.name == kernel and p.variant == "dram"]
        assert sorted(measured) == sorted(set(FORMATS) - set(KIN))  # each once
    assert {p.weight_format for p in quick} == {p.weight_format for p in full if p.name == "linear"}
    for plan in (*full, *coarse, *quick):
        sizes = [case.size for case in plan.cases]
        assert sizes == sorted(set(sizes))
        assert all(case.work > 0 for case in plan.cases)
    assert max(stream_bytes(plans) for plans in (full, coarse, quick)) <= 512 << 20


def expert_sizes(isa: Isa, detail: Detail, variant: str) -> dict[str, list[int]]:
    """Sizes of the experts' curves by format."""
    found = [p for p in plans_of(isa, detail) if (p.name, p.variant) == ("moe_experts", variant)]
    return {p.weight_format: [case.size for case in p.cases] for p in found}


def test_experts_with_amx_are_measured_on_both_sides_of_where_its_tiles_begin_to_multiply():
    for detail in Detail:
        assert all({63, 64, 256} <= set(sizes) for sizes in expert_sizes(Isa.AMX_BF16, detail, "dram").values())
    assert cpu_isa(Isa.AMX_BF16).many_rows == 64
    assert all(sizes[-1] == 64 for sizes in expert_sizes(Isa.AVX512_VNNI, Detail.QUICK, "dram").values())
    assert all(sizes[-1] == 512 for sizes in expert_sizes(Isa.AVX512_VNNI, Detail.FULL, "dram").values())


def test_wide_experts_of_whole_numbers_are_measured_at_the_quick_points_where_memory_holds_them():
    for isa in (Isa.AVX2, Isa.AMX_BF16):
        quick = expert_sizes(isa, Detail.QUICK, "wide")
        assert set(quick) == {"q8", "q4"} and quick == expert_sizes(isa, Detail.FULL, "wide")
        assert quick == {form: expert_sizes(isa, Detail.QUICK, "dram")[form] for form in quick}
    assert all(plan.variant != "wide" for plan in curve_plans(Isa.AVX2, Detail.QUICK, 64 << 20))


def test_more_points_get_less_time_each_within_bounds():
    plans = list(curve_plans(Isa.AVX2, Detail.COARSE, 64 << 20))
    few, many = (kernel_curves.point_us(plans * n, Detail.FULL) for n in (2, 8))
    assert few > many
    points = sum(len(plan.cases) for plan in plans * 8)
    assert points * many * 2 == pytest.approx(kernel_curves._SECONDS[Detail.FULL] * 1e6)  # two rounds
    assert kernel_curves.point_us(plans * 1000, Detail.FULL) == kernel_curves._LEAST_POINT_US
    assert kernel_curves.point_us(plans[:1], Detail.FULL) == kernel_curves._MOST_POINT_US


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_disk_is_left_alone_when_it_is_nearly_full(monkeypatch, tmp_path):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": GIB})())
    with pytest.raises(HetcompError, match="less than 2 GiB"):
        disk.measure_disk(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(disk.os, "fsync", full_disk)
    monkeypatch.setattr(disk, "FILE_BYTES", 32 << 20)
    with pytest.raises(HetcompError, match="No space left"):
        disk.measure_disk(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_disk_is_read_and_the_file_removed(monkeypatch, tmp_path):
    monkeypatch.setattr(disk, "FILE_BYTES", 32 << 20)
    try:
        figure, readings = disk.measure_disk(tmp_path)
    except HetcompError as error:  # a file system without O_DIRECT, or no room
        assert "was not measured" in str(error)
    else:
        assert len(readings) == 4
        assert min(readings) <= figure.gb_per_s <= max(readings)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_the_old_profile(monkeypatch, tmp_path, fake):
    target = tmp_path / "p.json"
    target.write_text("old")
    profile = measure_machine.measure_machine(machine(), quick=True)
    monkeypatch.setattr(measure.os, "fsync", full_disk)
    with pytest.raises(HetcompError, match=r"p\.json cannot be written: No space left"):
        measure.keep(profile, target)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


def test_the_command_refuses_what_it_cannot_do_before_it_measures(monkeypatch, tmp_path):
    monkeypatch.setenv("HETCOMP_CACHE", str(tmp_path / "cache"))
    refuse_compiler(monkeypatch)
    for arguments, sentence in (
        (["-o", str(tmp_path / "absent" / "p.json")], "cannot be written"),
        (["-o", str(tmp_path)], "it is a folder"),
        (["-o", str(tmp_path / "p.json")], "No usable C++ compiler"),
    ):
        result = CliRunner().invoke(app, ["profile", *arguments])
        assert result.exit_code == 1
        assert sentence in result.stderr
        assert result.stderr.startswith("hetcomp: ")
        assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_quick_profile_does_not_take_the_place_of_a_full_one(fake, tmp_path):
    arguments = ["profile", "-o", str(tmp_path / "p.json")]
    assert "kept for --hw auto" in CliRunner().invoke(app, arguments).stdout
    full = parse_profile((tmp_path / "p.json").read_text(), "p.json")
    assert load_profile("auto").curves == full.curves
    best = full.curves[0].isa
    fake[best] = fake[best][:1]
    result = CliRunner().invoke(app, [*arguments, "--quick"])
    assert "not kept: --hw auto goes on with the full profile" in result.stdout.replace("\n", " ")
    assert load_profile("auto").curves == full.curves
    assert parse_profile((tmp_path / "p.json").read_text(), "p.json").curves == fake[best]
    printed = CliRunner().invoke(app, ["profile", "--quick", "--json"]).stdout
    assert parse_profile(printed, "stdout").measured


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """This machine, measured quickly into a cache of its own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HETCOMP_CACHE", str(folder))
        yield load_profile("auto"), folder


@pytest.mark.slow
@pytest.mark.exhaustive  # in make test tests/e2e/test_accountability.py measures it
def test_this_machine_is_measured(measured):
    profile, _ = measured
    assert profile.measured
    assert profile.measured_at
    best = [isa.value for isa in Isa if isa.value in profile.isas][-1]
    assert {(r.isa, r.weight_format) for r in profile.rates} == {(best, form) for form in ("f32", "bf16", "q8", "q4")}
    # Wide limits: a figure outside of them is a wrong unit or an optimised-away loop, not a slow machine.
    assert 0.1 < profile.bandwidth() < 2000
    assert all(0.1 < rate.gflops_per_core < 1000 for rate in profile.rates)
    assert 0 < profile.barrier_us < 10_000
    assert 0 < profile.available_bytes() <= sum(node.memory_bytes for node in profile.nodes)
    assert profile.threads <= len(os.sched_getaffinity(0))
    # Weights from memory are not read faster than caches give, nor is one token dearer than many.
    fastest = max(point.gb_per_s for point in profile.cached_reads)
    for curve in profile.curves:
        assert curve.points[0].rate * bytes_a_weight(curve.weight_format) < 1.5 * fastest
        assert curve.points[-1].rate < 1.5 * curve.points[0].rate


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_second_time_comes_from_the_cache(measured, monkeypatch):
    profile, folder = measured
    monkeypatch.setattr(measure, "_measure", lambda machine: pytest.fail("measured again"))
    assert load_profile("auto").sha256() == profile.sha256()
    assert [path.name.startswith("profile-") for path in folder.glob("*.json")] == [True]
    assert not list(folder.glob(".*"))


def test_figures_of_a_busy_machine_and_damaged_files_are_measured_again(fake, monkeypatch):
    profile: HardwareProfile = measure_machine.measure_machine(detect_machine(), quick=True)
    profile = profile.model_copy(update={"curves": profile.curves[:1], "origin": f"{measure.BUSY} (load 9.0)"})
    cached = measure.cache_file(detect_machine())
    measure.keep(profile, cached)
    monkeypatch.setattr(measure, "_measure", lambda machine: profile.model_copy(update={"name": "again"}))
    long_ago = time.time() - 3600
    assert load_profile("auto").name == profile.name  # still fresh enough
    os.utime(cached, (long_ago, long_ago))
    assert load_profile("auto").name == "again"
    Path(cached).write_text("{")
    assert load_profile("auto").name == "again"
