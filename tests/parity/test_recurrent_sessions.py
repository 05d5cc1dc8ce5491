"""Sessions of models with recurrences, whose states cannot be cut back: truncation, prompts that differ from the one
before late or early, and what is computed again for them, on the CPU and where a GPU has the states."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transformers import PreTrainedModel

from hetcomp.executable import Executable
from hetcomp.runtime import Session
from tests.parity.test_families import TOLERANCE, reference_logits, relative_error
from tests.parity.test_gpu_families import compile_tiny
from tests.reference.emulated_gpu import emulated_gpu
from tests.reference.tiny_models import save_tiny, token_ids


@pytest.fixture(scope="module", params=["cpu", "experts"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[PreTrainedModel, Executable]]:
    folder = tmp_path_factory.mktemp(request.param)
    model = save_tiny("qwen3_next", folder / "hf", odd=True)
    with emulated_gpu(compute_capability=89):
        exe = compile_tiny(folder, request.param)
        yield model, exe
        exe.runtime.close()


def _goes_on(session: Session, model: PreTrainedModel, ids: list[int], kept: int) -> None:
    """A prompt of which the session has the beginning already."""
    row = session.prefill(ids[kept:])
    want = reference_logits(model, token_ids(model, 1).new_tensor([ids]))[-1]
    assert relative_error(row, want) < TOLERANCE
    assert len(session) == len(ids)


@pytest.mark.slow
def test_truncation_computes_what_stays_again(pair):
    model, exe = pair
    ids = token_ids(model, 14, seed=5)[0].tolist()
    with exe.runtime.session() as session:
        for length in (9, 4, 1, 0):
            session.prefill(ids[:10])
            session.truncate(length)
            assert len(session) == length
            _goes_on(session, model, [*ids[:length], *ids[10:14]], length)
            session.reset()


@pytest.mark.slow
def test_a_prompt_goes_on_from_the_last_checkpoint_that_it_agrees_with(pair):
    model, exe = pair
    ids = token_ids(model, 20, seed=6)[0].tolist()
    # What the states hold in front of each prompt's step: nothing, 4 tokens, 7 tokens.
    for same, kept in ((10, 10), (9, 7), (7, 7), (6, 4), (3, 0)):
        with exe.runtime.session() as session:
            for part in (slice(0, 4), slice(4, 7), slice(7, 10)):
                session.prefill(ids[part])
            prompt = [*ids[:same], *ids[12:15]]
            assert session.reuse(prompt) == kept
            exe.runtime.reset_stats()
            _goes_on(session, model, prompt, kept)
            assert exe.runtime.stats()["prefill"]["tokens"] == len(prompt) - kept


@pytest.mark.slow
def test_decode_of_several_after_truncation(pair):
    model, exe = pair
    texts = [token_ids(model, n, seed=n)[0].tolist() for n in (6, 9)]
    sessions = [exe.runtime.session() for _ in texts]
    for session, ids in zip(sessions, texts, strict=True):
        session.prefill(ids)
        session.truncate(len(ids) - 2)
    rows = exe.runtime.decode(sessions, [ids[-2] for ids in texts])
    for row, ids in zip(rows, texts, strict=True):
        want = reference_logits(model, token_ids(model, 1).new_tensor([ids]))[-2]
        assert relative_error(row, want) < TOLERANCE
    for session in sessions:
        session.close()
