"""From a recorded run to the artifact whose expert cache it decides about, which gives what transformers gives."""

from __future__ import annotations

import numpy as np
import pytest

from hetcomp.passes.memory_table import GPU_RESERVE
from hetcomp.record_routing import record_text
from tests.parity.test_families import TOLERANCE, reference_logits, relative_error
from tests.parity.test_record_routing import TOKENS, build
from tests.reference.emulated_gpu import emulated_gpu
from tests.reference.tiny_models import VOCAB, save_tiny, token_ids


@pytest.mark.slow
@pytest.mark.parametrize("vram", [None, 0], ids=["room for all", "no room"])
def test_a_recorded_trace_decides(tmp_path, vram):
    model = save_tiny("qwen3_moe", tmp_path / "hf")
    cpu = build(tmp_path, on_gpu=False)
    text = np.random.default_rng(0).integers(3, VOCAB, 1100).tolist()
    record_text(cpu, text, "random ids").write(tmp_path / "trace.safetensors")
    cpu.runtime.close()
    ids = token_ids(model, TOKENS)
    wishes = {"expert_cache": "auto", "routing_trace": tmp_path / "trace.safetensors", "pins": ("*=gpu:0",)}
    if vram is not None:
        wishes |= {"vram": GPU_RESERVE + 400_000, "pins": ()}
    with emulated_gpu(compute_capability=89):
        exe = build(tmp_path, on_gpu=True, **wishes)
        choice = exe.plan.cache_choice
        assert choice is not None and choice.steps == 1100 // 2 - 1100 // 4  # the later half, of two sequences
        cache = exe.plan.expert_cache
        assert choice.chosen == ("static" if cache is None else cache.policy)
        assert relative_error(exe(ids[0].tolist()), reference_logits(model, ids)) < TOLERANCE
        exe.runtime.close()
