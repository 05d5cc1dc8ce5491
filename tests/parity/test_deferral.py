"""Deferral of experts beside an emulated GPU, whole artifacts, against its definition in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedModel

import hetcomp
from hetcomp.backends.exchange import Exchange
from hetcomp.compiler import plan_model
from hetcomp.deferral_on_text import deferring
from hetcomp.executable import Executable
from hetcomp.hardware.figures import BandwidthPoint
from hetcomp.ir.deferral import LayerChoices, moe_layers
from hetcomp.ir.ops import Linear
from hetcomp.ir.plan import Plan
from hetcomp.ir.serialise import from_json, to_json
from hetcomp.passes.placement_problem import GPU_RESERVE
from hetcomp.plan_wishes import PlanWishes
from tests.parity.test_families import TOLERANCE, reference_logits, relative_error
from tests.reference import deferral_reference
from tests.reference.deferral_reference import deferred_logits, split_choices
from tests.reference.emulated_gpu import emulated_gpu
from tests.reference.plan_builder import GIB, avx2_machine, gpu
from tests.reference.tiny_models import save_tiny, token_ids

# Relative to the largest logit: what is left of float32 when linears of a few layers sum in another order.
ROUNDING = 1e-5
CONTEXT = 32
EXPERTS_ON_CPU = ("*=gpu:0", "moe.experts=cpu")
ON_TWO_GPUS = ("*@0=gpu:0", "*@1=gpu:1", "*@2=gpu:0", "moe.experts=cpu")
# What is not pinned goes to the GPU as long as it fits: the CPU's memory takes so long to read.
SLOW = BandwidthPoint(threads=4, gb_per_s=0.01)


@dataclass(frozen=True)
class Case:
    """A tiny model whose layers defer ``deferral`` choices; ``expected``: what its MoE layers then defer. ``vram``:
    bytes of the GPU's memory, 0: all experts are on the CPU, everything else by ``pins``. ``memory``: free bytes of the
    CPU's nodes."""

    name: str
    family: str
    deferral: int
    expected: tuple[int, ...]
    odd: bool = False
    sizes: Mapping[str, object] = field(default_factory=dict)
    vram: int = 0
    nodes: int = 1
    memory: tuple[int, int] = (8 * GIB, 8 * GIB)
    pins: tuple[str, ...] = EXPERTS_ON_CPU
    gpus: int = 1

    def compile(self, folder: Path, plan: Path | None = None) -> Executable:
        """The model in ``folder``/hf."""
        plain = avx2_machine(self.nodes, self.memory)
        slow = tuple(node.model_copy(update={"read_bandwidth": (SLOW,)}) for node in plain.nodes)
        machine = plain.model_copy(update={"gpus": (gpu(),) * self.gpus, **({"nodes": slow} if self.vram else {})})
        wishes = PlanWishes(
            pins=() if self.vram else self.pins,
            vram=GPU_RESERVE + self.vram if self.vram else None,
            deferral=self.deferral,
        )
        out = folder / ("again.hetc" if plan else "tiny.hetc")
        return hetcomp.compile(
            folder / "hf",
            machine,
            formats="f32",
            context_length=CONTEXT,
            max_batch=3,
            out=out,
            isa=("avx2",),
            wishes=wishes,
            plan=plan,
        )


pytestmark = pytest.mark.spread("compiled")
CASES = (
    Case("one", "qwen3_moe", 1, (1, 1, 0)),
    Case("all-of-two", "qwen3_moe", 5, (2, 2, 0)),
    Case(
        "dense-between",
        "qwen3_moe",
        2,
        (2, 2, 2, 0),
        odd=True,
        sizes={"mlp_only_layers": [0, 2], "num_hidden_layers": 6},
    ),
    Case("dense-first", "deepseek_v3", 1, (1, 0)),
    Case("shared-expert", "glm4_moe", 2, (2, 0), odd=True),
    Case("split", "qwen2_moe", 1, (1, 1, 0), vram=700_000),
    Case("biases-split-over-nodes", "gpt_oss", 1, (1, 1, 1, 0), vram=900_000, nodes=2),
    Case("slices-of-nodes", "qwen3_moe", 1, (1, 1, 0), sizes={"moe_intermediate_size": 96}, nodes=2),
    Case("whole-experts-of-nodes", "qwen3_moe", 1, (1, 1, 0), nodes=2, memory=(8 * GIB, 400_000)),
    Case("layers-on-two-gpus", "qwen3_moe", 1, (1, 1, 0), pins=ON_TWO_GPUS, gpus=2),
)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[PreTrainedModel, Executable]]:
    case: Case = request.param
    folder = tmp_path_factory.mktemp(case.name)
    model = save_tiny(case.family, folder / "hf", odd=case.odd, **case.sizes)
    with emulated_gpu(compute_capability=89, devices=case.gpus):
        exe = case.compile(folder)
        assert tuple(layer.placement.deferred for layer in moe_layers(exe.plan)) == case.expected
        runtime = exe.runtime  # loaded here, whether a test runs it or not: only here is there such a GPU
        yield model, exe
        runtime.close()


@pytest.mark.slow
def test_of_all_tokens_of_a_text(compiled):
    model, exe = compiled
    ids = token_ids(model, 9)
    exe.runtime.set_deferral("all")
    deferred = exe(ids[0].tolist())
    exe.runtime.set_deferral("none")
    plain = exe(ids[0].tolist())
    exe.runtime.set_deferral("generated")
    want, undeferred = deferred_logits(model, ids, exe.plan), reference_logits(model, ids)
    assert relative_error(deferred, want) < TOLERANCE
    assert relative_error(plain, undeferred) < TOLERANCE
    assert relative_error(want, undeferred) > 100 * TOLERANCE  # it is another model


@pytest.mark.slow
def test_generated_tokens_alone_by_default(compiled):
    model, exe = compiled
    ids = token_ids(model, 10, seed=3)
    with exe.runtime.session() as session:
        rows = [session.prefill(ids[0, :6].tolist())]
        rows += [exe.runtime.decode([session], [int(i)])[0] for i in ids[0, 6:]]
    assert relative_error(np.stack(rows), deferred_logits(model, ids, exe.plan, range(6, CONTEXT))[5:]) < TOLERANCE


TEXTS = (3, 5, 8, 2)  # tokens, the last of which is decoded


@pytest.fixture(scope="module")
def batches(compiled: tuple[PreTrainedModel, Executable]) -> list[dict[int, np.ndarray]]:
    """Logits by text, of steps that decode one, two and three of them and cut their sequences again: the first three,
    then the last three, read anew."""
    model, exe = compiled
    texts = [token_ids(model, n, seed=n)[0].tolist() for n in TEXTS]
    made = []
    for steps in [(0,), (1, 0), (0, 1, 2), (2, 0, 1)], [(1, 2, 3)]:
        sessions = {text: exe.runtime.session() for text in steps[-1]}
        for text, session in sessions.items():
            session.prefill(texts[text][:-1])
        for step in steps:
            rows = exe.runtime.decode([sessions[text] for text in step], [texts[text][-1] for text in step])
            made.append(dict(zip(step, rows, strict=True)))
            for text in step:
                sessions[text].truncate(len(sessions[text]) - 1)
        for session in sessions.values():
            session.close()
    return made


def has_linear_on_cpu(plan: Plan) -> bool:
    """Whether the CPU computes more than experts."""
    return any(
        isinstance(op.attrs, Linear) and dict(call.placements)[op.id].device.startswith("cpu")
        for call in plan.calls
        for op in plan.template(call.template).ops
    )


@pytest.mark.slow
def test_rows_do_not_depend_on_the_batch(compiled, batches):
    """Bit for bit: in any company and place, and in batches of one, two and three, unless linears of the CPU sum those
    of three in another order."""
    _, exe = compiled
    alone, two, three, turned, other = batches
    for rows in (turned, other):
        assert all(rows[member].tobytes() == three[member].tobytes() for member in rows.keys() & three.keys())
    assert two[0].tobytes() == alone[0].tobytes()
    if not has_linear_on_cpu(exe.plan):
        assert [three[member].tobytes() for member in two] == [row.tobytes() for row in two.values()]


@pytest.mark.slow
def test_the_same_choices_are_deferred_in_any_batch(compiled, batches, monkeypatch):
    """Those of the definition, from which others would be far."""
    model, exe = compiled

    def by_definition(text: int) -> np.ndarray:
        return deferred_logits(
            model, token_ids(model, TEXTS[text], seed=TEXTS[text]), exe.plan, range(TEXTS[text] - 1, CONTEXT)
        )[-1]

    want = [by_definition(text) for text in range(len(TEXTS))]
    for rows in batches:
        for text, row in rows.items():
            assert relative_error(row, want[text]) < ROUNDING
    layer = moe_layers(exe.plan)[0]
    if layer.placement.deferred < layer.attrs.top_k:
        monkeypatch.setattr(deferral_reference, "split_choices", largest_deferred)
        assert max(relative_error(by_definition(text), want[text]) for text in range(len(TEXTS))) > 1000 * ROUNDING


def largest_deferred(
    ids: Sequence[int], weights: Sequence[float], on_cpu: Sequence[bool], deferred: int
) -> tuple[list[int], list[int]]:
    """As many choices as split_choices, but of the largest weights."""
    return split_choices(ids, [-weight for weight in weights], on_cpu, deferred)


@pytest.mark.slow
def test_what_deferral_is_measured_with_is_the_definition(compiled):
    model, exe = compiled
    ids = token_ids(model, 7, seed=4)
    layers = [LayerChoices(layer.placement.deferred, layer.on_cpu) for layer in moe_layers(exe.plan)]
    with deferring(model, layers):
        measured = reference_logits(model, ids)
    assert relative_error(measured, deferred_logits(model, ids, exe.plan)) < TOLERANCE


@pytest.mark.slow
def test_a_plan_is_replayed_with_its_deferral(tmp_path):
    """Also where its layers defer different numbers, as those of a plan do that keeps a budget of accuracy."""
    case = CASES[2]
    model = save_tiny(case.family, tmp_path / "hf", odd=case.odd, **case.sizes)
    ids = token_ids(model, 7)
    with emulated_gpu(compute_capability=89):
        plan = case.compile(tmp_path).plan
        assert from_json(to_json(plan)) == plan
        counts = dict(zip((layer.call for layer in moe_layers(plan)), (2, 0, 1, 0), strict=True))
        calls = [
            replace(
                call, placements=tuple((op, replace(p, deferred=p.deferred and counts[i])) for op, p in call.placements)
            )
            for i, call in enumerate(plan.calls)
        ]
        edited = tmp_path / "edited.json"
        edited.write_text(to_json(replace(plan, calls=tuple(calls))))
        exe = case.compile(tmp_path, edited)
        assert [call.placements for call in exe.plan.calls] == [call.placements for call in calls]
        assert [layer.placement.deferred for layer in moe_layers(exe.plan)] == [2, 0, 1, 0]
        exe.runtime.set_deferral("all")
        deferred = exe(ids[0].tolist())
    assert relative_error(deferred, deferred_logits(model, ids, exe.plan)) < TOLERANCE


def test_without_deferral_all_layers_share_the_buffers(tmp_path):
    save_tiny("qwen3_moe", tmp_path / "hf")
    machine = avx2_machine(1).model_copy(update={"gpus": (gpu(),)})

    def inputs(deferral: int) -> list[str]:
        wishes = PlanWishes(pins=EXPERTS_ON_CPU, deferral=deferral)
        plan = plan_model(tmp_path / "hf", hw_profile=machine, wishes=wishes, planning=False).plan
        exchange = Exchange.of(plan)
        return [exchange.carriers[h.flag, "x"] for h in exchange.hand_overs]

    assert len(set(inputs(0))) == 1
    first, second, third = inputs(1)
    assert first == third != second
