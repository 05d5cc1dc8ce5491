"""Sequences that hold fewer positions together than each of them may alone: whole models on the CPU and on the emulated
GPU, whose driver knows which addresses have memory, against transformers in float32."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from transformers import PreTrainedModel

import hetcomp
from hetcomp.executable import Executable
from hetcomp.ir.kv_pool import GRANULE_BYTES, KvPool, block_bytes
from hetcomp.ir.plan import ValueKind
from hetcomp.plan_wishes import PlanWishes
from hetcomp.runtime import RuntimeRefusal
from hetcomp.runtime_abi import Status
from tests.parity.test_families import TOLERANCE, reference_logits, relative_error
from tests.reference.emulated_gpu import emulated_gpu
from tests.reference.plan_builder import avx2_machine, gpu
from tests.reference.tiny_models import save_tiny, token_ids
from tests.sampled_cases import rest

KV_TOKENS, CONTEXT, MAX_BATCH = 110, 512, 3
# A block of 64 positions in f32 fills a granule: a sequence of 65 tokens has two.
WIDE_CACHE = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 256, "num_hidden_layers": 2}
_STEP = 32  # tokens: a tile of rows, for which the interpreter takes seconds, and the runtime waits 30 s
PINS = {"cpu": ("*=cpu",), "gpu": ("*=gpu:0",), "experts on the cpu": ("*=gpu:0", "moe.experts=cpu")}

Pair = tuple[PreTrainedModel, Executable]


@pytest.fixture(scope="module", params=["cpu", "gpu", *rest(["experts on the cpu"])])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("shared")
    model = save_tiny("qwen3_moe", folder / "hf", **WIDE_CACHE)
    with emulated_gpu(compute_capability=89):
        exe = hetcomp.compile(
            folder / "hf",
            avx2_machine(1).model_copy(update={"gpus": (gpu(),)}),
            formats="f32",
            context_length=CONTEXT,
            max_batch=MAX_BATCH,
            kv_tokens=KV_TOKENS,
            out=folder / "tiny.hetc",
            isa=("avx2",),
            wishes=PlanWishes(pins=PINS[request.param]),
        )
        yield model, exe
        exe.runtime.close()


@pytest.mark.slow
def test_growth_exhaustion_and_return(pair):
    model, exe = pair
    assert exe.runtime.info.kv_tokens == KV_TOKENS
    texts = [token_ids(model, n, seed=n) for n in (32, 66, 46)]
    wanted = [reference_logits(model, ids) for ids in texts]
    a, b, c = sessions = [exe.runtime.session() for _ in texts]

    def check(rows: np.ndarray, *which: int) -> None:
        want = np.stack([wanted[i][len(sessions[i]) - 1] for i in which])
        assert relative_error(rows, want) < TOLERANCE

    def fill(i: int, end: int) -> None:
        session, ids = sessions[i], texts[i][0].tolist()
        for first in range(len(session), end, _STEP):
            row = session.prefill(ids[first : min(first + _STEP, end)])
        check(row[None], i)

    def decode(*which: int) -> None:
        ids = [int(texts[i][0, len(sessions[i])]) for i in which]
        check(exe.runtime.decode([sessions[i] for i in which], ids), *which)

    fill(0, 29)
    fill(1, 62)
    decode(0, 1)
    decode(0, 1)  # b comes to the end of its first granule
    with pytest.raises(RuntimeRefusal, match=r"95 of its 110 .* by 2 sequences, and 20 more are needed") as refused:
        c.prefill(texts[2][0, :20].tolist())
    assert refused.value.status is Status.POOL_FULL
    assert len(c) == 0
    fill(2, 12)
    # b goes over the border, beside a row of nobody where the GPU has graphs of 1, 2 and 4 rows.
    decode(0, 1, 2)
    a.close()
    fill(2, 43)
    decode(1)
    b.close()
    decode(2)
    c.close()


@pytest.mark.slow
def test_the_gpu_has_no_more_memory_than_the_plan_says(pair):
    _, exe = pair
    if exe.runtime.info.gpu is None:
        pytest.skip("this one is the CPU's")
    pool = KvPool.of(exe.plan.max_dims())
    states = [v.type for v in exe.plan.values if v.kind is ValueKind.STATE]
    memory = pool.gpu_memory(sum(map(block_bytes, states)))
    assert memory.granules is not None and memory.bytes < memory.addresses / 2
    assert memory.bytes == memory.granules * GRANULE_BYTES
    assert memory.bytes <= sum(map(pool.gpu_bytes, states)) + pool.granule_waste
