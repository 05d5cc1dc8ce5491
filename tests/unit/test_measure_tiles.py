"""Tiles by measurement: the fastest is taken, what fails is dropped, what was measured is remembered; candidates write
the same numbers. Times are made up: there is no GPU here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import hetcomp.compiler
from hetcomp.backends import packing
from hetcomp.backends.gpu import measure_tiles as module
from hetcomp.backends.gpu.compile_kernels import CompiledKernel
from hetcomp.backends.gpu.gpu_program import lower_programs
from hetcomp.backends.gpu.kernels import GpuKernel, GpuRequest
from hetcomp.backends.gpu.measure_tiles import measure_tiles
from hetcomp.backends.gpu.tile_choices import MeasuredTile, TileChoices, choices_of
from hetcomp.backends.gpu.tile_timer import GpuTimer, TimingJob, VariantTime
from hetcomp.backends.gpu.write_kernels import write_kernels
from hetcomp.build_artifact import _measured_tiles
from hetcomp.cli.main import app
from hetcomp.compiler import plan_model
from hetcomp.errors import HetcompError
from hetcomp.ir import ops
from hetcomp.ir.types import DType
from hetcomp.plan_wishes import PlanWishes
from hetcomp.planned import Planned
from tests.reference.experts_case import expert_weights
from tests.reference.kernel_harness import activation, cache, weight
from tests.reference.triton_harness import emit, request


class Progress:
    def __init__(self) -> None:
        self.stages: list[tuple[str, float | None]] = []
        self.done: list[str] = []

    def stage(self, name: str, total: float | None = None) -> None:
        self.stages.append((name, total))

    def advance(self, amount: float = 1, detail: str = "") -> None:
        self.done.append(detail)

    def warn(self, message: str) -> None:
        raise AssertionError(message)


class FakeTimer:
    """The later a candidate, the faster; ``difference`` of a variant from the first."""

    name, driver, cc = "a GPU", "1", 89

    def __init__(self, difference: Callable[[int], float] = lambda variant: 0.0) -> None:
        self.jobs: list[TimingJob] = []
        self.difference = difference

    def time(self, job: TimingJob) -> list[VariantTime]:
        self.jobs.append(job)
        for variant in job.variants:
            for launch in variant:
                for argument in launch.arguments:
                    assert "i32" in argument or argument["offset"] <= job.buffers[argument["buffer"]].bytes
        assert all(b.pattern is None or b.pattern.stat().st_size for b in job.buffers.values())
        assert set(job.outputs) <= set(job.buffers)
        return [
            VariantTime((100.0 - 10 * i,) * len(variant), self.difference(i)) for i, variant in enumerate(job.variants)
        ]


@pytest.fixture(scope="module")
def planned() -> Planned:
    return plan_model(
        "demo-moe",
        hw_profile="preset:9950x-64gb+rtx4090",
        formats="q4",
        isa=["avx2"],
        context_length=512,
        wishes=PlanWishes(vram=8 << 30, pins=("*=gpu:0",)),
    )


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """What would be compiled; kernels of a set do not fit."""
    monkeypatch.setenv("HETCOMP_CACHE", str(tmp_path))
    seen: list[GpuKernel] = []
    too_large: set[str] = set()

    def stand_in(kernels, cc: int, *, threads: int) -> dict[str, CompiledKernel]:
        seen.extend(kernels)
        able = (k for k in seen if k.name not in too_large)
        return {k.name: CompiledKernel(k, cc, k.function, Path("none"), k.warps, 0, 0) for k in able}

    monkeypatch.setattr(module, "compile_candidates", stand_in)
    return seen, too_large


def tiles_of(planned: Planned, tiles: TileChoices = TileChoices()) -> dict[str, tuple[int, int]]:  # noqa: B008
    """Of every class that has a choice: between how many, and the number of the chosen."""
    (program,) = lower_programs(planned.plan, tiles)
    launches = [la for graph in program.graphs for group in graph.groups for la in group.code.launches]
    found = {la.tile.key: (la.tile.candidates, la.tile.chosen) for la in launches if la.tile is not None}
    return {key: facts for key, facts in found.items() if facts[0] > 1}


def test_the_fastest_candidate_of_every_class_is_taken(planned, compiled):
    timer, progress = FakeTimer(), Progress()
    measured = measure_tiles(planned.plan, timer, threads=1, progress=progress)
    classes = tiles_of(planned)
    assert {m.key for m in measured} == set(classes)
    assert {key.partition("_")[0] for key in classes} >= {"attention", "experts", "linear"}
    assert all(m.chosen == classes[m.key][0] - 1 for m in measured)
    assert tiles_of(planned, choices_of(measured)) == {key: (n, n - 1) for key, (n, _) in classes.items()}
    assert progress.stages == [("measure tiles on a GPU", len(timer.jobs))] and len(progress.done) == len(timer.jobs)


def test_what_was_measured_is_remembered_for_this_gpu(planned, compiled):
    kernels, _ = compiled
    first = measure_tiles(planned.plan, FakeTimer(), threads=1, progress=Progress())
    kernels.clear()
    timer, progress = FakeTimer(), Progress()
    assert sorted(measure_tiles(planned.plan, timer, threads=1, progress=progress), key=str) == sorted(first, key=str)
    assert not timer.jobs and not kernels and not progress.stages
    timer.driver = "2"
    measure_tiles(planned.plan, timer, threads=1, progress=progress)
    assert timer.jobs and kernels


def test_a_candidate_that_does_not_fit_is_dropped(planned, compiled):
    _, too_large = compiled
    (program,) = lower_programs(planned.plan, TileChoices(others=9))
    last = [la for g in program.graphs for s in g.groups for la in s.code.launches]
    too_large |= {la.kernel.name for la in last if la.kernel.function == "attention_prefill"}
    measured = measure_tiles(planned.plan, FakeTimer(), threads=1, progress=Progress())
    attention = [m for m in measured if m.key.startswith("attention")]
    assert attention and all(m.us[-1] is None and m.chosen == len(m.us) - 2 for m in attention)
    assert all(m.us[-1] is not None for m in measured if m not in attention)


def test_other_numbers_than_the_tables_do_not_count_nor_does_little_gain(planned, compiled):
    wrong = FakeTimer(lambda variant: float("inf") if variant == 1 else 0.1 if variant else 0.0)
    measured = measure_tiles(planned.plan, wrong, threads=1, progress=Progress())
    assert all(m.chosen == 0 and m.us == (m.us[0], *(None for _ in m.us[1:])) for m in measured)


def test_hardly_faster_is_not_faster(planned, compiled):
    class Even(FakeTimer):
        def time(self, job: TimingJob) -> list[VariantTime]:
            return [VariantTime((100.0 - i / 2,) * len(v), 0.0) for i, v in enumerate(job.variants)]

    assert choices_of(measure_tiles(planned.plan, Even(), threads=1, progress=Progress())) == TileChoices()


def test_a_gpu_that_fails_leaves_the_tables_and_nothing_is_remembered(planned, compiled, tmp_path):
    class Broken(FakeTimer):
        def time(self, job: TimingJob) -> list[VariantTime]:
            return []

    measured = measure_tiles(planned.plan, Broken(), threads=1, progress=Progress())
    assert measured and all(m.chosen == 0 and set(m.us) == {None} for m in measured)
    assert not list(tmp_path.rglob("tile-*.json"))


def test_a_candidate_that_fails_takes_no_other_with_it(planned, compiled):
    class Faulty(FakeTimer):
        bad = ""

        def time(self, job: TimingJob) -> list[VariantTime]:
            names = [{launch.made.kernel.name for launch in variant} for variant in job.variants]
            if any(self.bad in of_variant for of_variant in names):
                return []
            return super().time(job)

    timer = Faulty()
    (program,) = lower_programs(planned.plan, TileChoices(others=1))
    launches = [la for g in program.graphs for s in g.groups for la in s.code.launches]
    timer.bad = next(la.kernel.name for la in launches if la.kernel.function == "attention_prefill")
    measured = measure_tiles(planned.plan, timer, threads=1, progress=Progress())
    attention = [m for m in measured if m.key.startswith("attention")]
    assert attention and all(m.us[0] is not None and m.us[1] is None for m in attention)
    assert all(None not in m.us[2:] for m in measured)


def test_time_that_is_up_leaves_the_tables(planned, compiled):
    timer = FakeTimer()
    assert measure_tiles(planned.plan, timer, threads=1, progress=Progress(), budget_s=-1.0) == []
    assert not timer.jobs


def test_without_a_gpu_nothing_is_said_unless_it_was_asked_for(planned, monkeypatch):
    monkeypatch.setattr(GpuTimer, "open", classmethod(lambda cls: None))
    progress = Progress()
    assert _measured_tiles(planned, [89], None, progress) == [] and not progress.stages
    with pytest.raises(HetcompError, match="--tune times kernels on this machine's GPU, but there is none"):
        _measured_tiles(planned, [89], True, progress)


def test_another_architecture_is_not_measured(planned, monkeypatch):
    class Other(FakeTimer):
        def __enter__(self) -> Other:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(GpuTimer, "open", classmethod(lambda cls: Other()))
    assert _measured_tiles(planned, [90], None, Progress()) == []
    with pytest.raises(HetcompError, match="this machine's a GPU, but code is generated for compute capability 90"):
        _measured_tiles(planned, [90], True, Progress())


@pytest.mark.parametrize(("option", "tune"), [([], None), (["--tune"], True), (["--no-tune"], False)])
def test_the_command_line_decides(monkeypatch, option, tune):
    seen: dict[str, object] = {}

    def compile(model: str, **options: object) -> SimpleNamespace:
        seen.update(options)
        return SimpleNamespace(path="x.hetc")

    monkeypatch.setattr(hetcomp.compiler, "compile", compile)
    done = CliRunner().invoke(app, ["compile", "m", "-o", "x.hetc", *option])
    assert done.exit_code == 0 and seen["tune"] is tune


def test_the_artifact_tells_what_was_measured(tmp_path):
    write_kernels([], tmp_path, [MeasuredTile("a class", 1, (3.0, 2.0, None))])
    table = json.loads((tmp_path / "kernels.json").read_text())
    assert table["tiles"] == [{"launches": "a class", "candidate": 1, "us": [3.0, 2.0, None]}]


DIMS = {"T": 4096, "R": 64, "slots": 1, "context": 4096}


def _linear(form: str, rows: int) -> GpuRequest:
    values = [activation("x", "T", 256), weight("w", (160, 256), form, packing.PANELS)]
    return request(ops.Linear(256, 160), values, [activation("y", "T", 160)], {**DIMS, "T": rows})


def _experts(rows: int) -> GpuRequest:
    a = ops.MoeExperts(experts=4, top_k=2, hidden=128, intermediate=64)
    values = [activation("x", "T", 128), activation("i", "T", 2), activation("r", "T", 2), *expert_weights(a, "q4")]
    return request(a, values, [activation("y", "T", 128)], {**DIMS, "T": rows})


def _attention() -> GpuRequest:
    a = ops.Attention(heads=8, kv_heads=2, head_dim=64, v_head_dim=64, scale=0.125)
    values = [activation("q", "T", 8, 64), *(cache(n, DType.BF16, 2, 64) for n in "kv")]
    return request(a, values, [activation("y", "T", 8, 64)], DIMS)


@pytest.mark.parametrize(
    "asked",
    [_linear("q4", 64), _linear("q4", 512), _linear("f32", 64), _linear("f32", 512), _linear("bf16", 4096), _experts(8),
     _experts(100), _experts(512), _attention()],
)  # fmt: skip
def test_candidates_have_grids_that_cover_the_same(asked):
    """Programs times the tile's rows and columns reach all rows and columns, whatever the tile."""
    for other in range(5):
        for launch in emit(dataclasses.replace(asked, tiles=TileChoices(others=other))).launches:
            constants = dict(launch.kernel.constants)
            if "M_TILE" not in constants or "N_TILE" not in constants:
                continue
            tile_rows, tile_columns = int(constants["M_TILE"] or 0), int(constants["N_TILE"] or 0)
            rows, columns = asked.max_rows(), int(constants.get("N") or constants["INTERMEDIATE"] or 0)
            if launch.kernel.function == "experts_down_gemm":
                columns = int(constants["HIDDEN"] or 0)
            if "EXPERTS" in constants:
                # Entries of each expert begin a tile of their own.
                rows = asked.max_rows() * 2 + int(constants["EXPERTS"] or 0) * tile_rows
            assert launch.grid[0].programs(asked.max_rows()) * tile_rows >= rows
            assert launch.grid[1].programs(asked.max_rows()) * tile_columns >= columns
