"""A run with the routing of a trace: the CPU's experts get it, a GPU's routers cannot, and what is wrong is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import hetcomp
from hetcomp.errors import HetcompError
from hetcomp.models_zoo import routing_traces
from hetcomp.record_routing import recorded_steps
from hetcomp.replay_routing import replayed_routing, routing_of
from hetcomp.routing_trace import RoutingTrace
from hetcomp.runtime import RuntimeRefusal
from tests.e2e.command_line import refusal, run
from tests.parity.test_deferral import EXPERTS_ON_CPU
from tests.parity.test_families import TOLERANCE, relative_error
from tests.parity.test_record_routing import TOKENS, build
from tests.reference.emulated_gpu import emulated_gpu
from tests.reference.plan_builder import avx2_machine
from tests.reference.tiny_models import save_tiny, token_ids


@torch.inference_mode()
def forced_logits(model: torch.nn.Module, ids: torch.Tensor, trace: RoutingTrace) -> np.ndarray:
    """transformers, whose experts get the trace's choices."""
    experts = [m for m in model.modules() if hasattr(type(m), "_apply_gate") and hasattr(m, "down_proj")]

    def forced(whole, layer):
        chosen = torch.tensor(trace.experts[: ids.shape[1], layer].astype(np.int64))
        weights = torch.tensor(trace.weights[: ids.shape[1], layer].astype(np.float32))
        return lambda hidden, _ids, _weights: whole(hidden, chosen, weights)

    for layer, module in enumerate(experts):
        module.forward = forced(module.forward, layer)
    try:
        return model(ids).logits[0].numpy()
    finally:
        for module in experts:
            del module.forward


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_the_cpus_experts_get_it(tmp_path, threads):
    model = save_tiny("qwen3_moe", tmp_path / "hf")
    exe = build(tmp_path, on_gpu=False, threads=threads)
    trace = routing_of("zipf:1,markov:0.5", exe.plan)
    ids = token_ids(model, TOKENS)
    plain = exe.runtime.forward(ids[0].tolist())
    with replayed_routing(exe, trace) as replayed:
        assert "100.0% of the choices" in replayed.note and replayed.ids[:3] == (0, 1, 2)
        whole = exe.runtime.forward(ids[0].tolist())
        with exe.runtime.session() as session, recorded_steps(exe.runtime) as steps:
            rows = [session.prefill(ids[0, :7].tolist())]
            rows += [exe.runtime.decode([session], [int(i)])[0] for i in ids[0, 7:]]
    expected = forced_logits(model, ids, trace)
    assert relative_error(whole, expected) < TOLERANCE
    assert relative_error(np.stack(rows), expected[6:]) < TOLERANCE
    made = np.concatenate([step.experts for step in steps], axis=1).swapaxes(0, 1)
    np.testing.assert_array_equal(made, trace.experts[:TOKENS])
    np.testing.assert_array_equal(exe.runtime.forward(ids[0].tolist()), plain)
    assert relative_error(whole, plain) > 0.01


@pytest.mark.slow
def test_other_shapes_are_refused_by_the_runtime_and_the_session_goes_on(tmp_path):
    save_tiny("qwen3_moe", tmp_path / "hf")
    runtime = build(tmp_path, on_gpu=False, threads=2).runtime
    right = np.zeros((3, 4, 2), np.int32)
    right[..., 1] = 1
    wrong = {
        "has fewer layers": right[:2],
        r"has 4 layers, the model 3": np.concatenate([right, right[:1]]),
        "has 1 choices of a token, the model 2": right[..., :1],
        "names expert 8, and layers have 8": right + 7,
        "names expert -1": right - 1,
    }
    with runtime.session() as session:
        before = session.prefill([1, 2, 3])
        for message, experts in wrong.items():
            runtime.replay_routing(experts, np.ones(experts.shape, np.float32))
            with pytest.raises(RuntimeRefusal, match=message):
                session.prefill([4])
        assert len(session) == 3
        with pytest.raises(RuntimeRefusal, match="of one shape"):
            runtime.replay_routing(right, np.ones((3, 4, 1), np.float32))
        runtime.replay_routing(None, None)
        session.reset()
        np.testing.assert_array_equal(session.prefill([1, 2, 3]), before)


@pytest.mark.slow
def test_beside_a_gpu_it_is_refused(tmp_path):
    save_tiny("qwen3_moe", tmp_path / "hf")
    with emulated_gpu(compute_capability=89):
        exe = build(tmp_path, on_gpu=True, pins=EXPERTS_ON_CPU)
        trace = routing_of("zipf:1,markov:0.5", exe.plan)
        with (
            pytest.raises(HetcompError, match=r"its routers run on a GPU.*random_artifact.*--vram 0"),
            replayed_routing(exe, trace),
        ):
            pass
        exe.runtime.replay_routing(np.zeros((3, 1, 2), np.int32), np.zeros((3, 1, 2), np.float32))
        with pytest.raises(RuntimeRefusal, match="routers run on a GPU"):
            exe.runtime.forward([1])
        exe.runtime.close()


@pytest.mark.slow
def test_through_bench(tmp_path):
    machine = avx2_machine(1)
    (tmp_path / "machine.json").write_text(machine.to_json())
    exe = hetcomp.compile("demo-moe", machine, context_length=64, out=tmp_path / "m.hetc", isa=("avx2",))
    common = ("bench", exe.path, "--prompt", "8", "--context", "8", "--tokens", "4", "--rounds", "1")
    common = (*common, "--hw", tmp_path / "machine.json", "--json")
    for spec, source in ((routing_traces()["law"], "law.txt"), ("zipf:1.1,markov:0.9", "zipf:1.1,markov:0.9")):
        said = run(*common, "--replay", spec)
        assert said.code == 0, said.err
        assert json.loads(said.out)["prompt"] == f"routing of {source}: 100.0% of the choices are the trace's"
    assert "neither a file nor understood" in refusal(*common, "--replay", "zipf:much")
    assert "cannot read" in refusal(*common, "--replay", tmp_path / "none")
    tiny = RoutingTrace.read(routing_traces()["law"])
    other = tmp_path / "other.safetensors"
    RoutingTrace(**{**vars(tiny), "n_experts": 64}).write(other)
    assert "is of another shape: it has 6 MoE layers of 64 experts" in refusal(*common, "--replay", other)
    assert "give one of them" in refusal(*common, "--replay", other, "--text", other)
