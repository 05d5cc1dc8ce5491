"""Steps that fail between a layer's deferral and its addition in the next one, and sequences that end beside others:
what was deferred reaches no other step, nothing is held for longer, and everyone else gets the same bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

import hetcomp
import tests.reference.emulated_gpu as emulation
from hetcomp.backends.gpu.kernels import GpuKernel
from hetcomp.executable import Executable
from hetcomp.ir.deferral import moe_layers
from hetcomp.runtime import Runtime, RuntimeRefusal, Session
from hetcomp.runtime_abi import Status
from tests.parity.test_deferral import CASES
from tests.reference.emulated_gpu import EmulatedGpu, GraphEnds
from tests.reference.tiny_models import save_tiny, token_ids

# Of three sequences the prompts, and the tokens that are fed to them one by one.
PROMPTS, STEPS = (3, 6, 4), 3
Rows = list[bytes]  # logits, by sequence


class Batch:
    """The three sequences in a runtime."""

    def __init__(self, runtime: Runtime, texts: Sequence[Sequence[int]]) -> None:
        self.runtime, self.texts = runtime, texts
        self.sessions = [self.begun(member) for member in range(len(texts))]

    def begun(self, member: int) -> Session:
        session = self.runtime.session()
        session.prefill(self.texts[member][: PROMPTS[member]])
        return session

    def decode(self, step: int) -> Rows:
        ids = [text[prompt + step] for text, prompt in zip(self.texts, PROMPTS, strict=True)]
        return [row.tobytes() for row in self.runtime.decode(self.sessions, ids)]

    @property
    def lengths(self) -> list[int]:
        return [len(session) for session in self.sessions]

    def close(self) -> None:
        for session in self.sessions:
            session.close()


class Deferring:
    """A model of three MoE layers, of which the first two defer a choice, and what its sequences are where nothing
    fails: ``expected`` by step."""

    def __init__(self, exe: Executable, gpu: EmulatedGpu, texts: Sequence[Sequence[int]]) -> None:
        self.exe, self.gpu, self.texts = exe, gpu, texts
        with self.batch(exe.runtime) as batch:
            self.expected = [batch.decode(step) for step in range(STEPS)]

    @contextmanager
    def batch(self, runtime: Runtime) -> Iterator[Batch]:
        batch = Batch(runtime, self.texts)
        try:
            yield batch
        finally:
            batch.close()


@pytest.fixture(scope="module")
def deferring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deferring]:
    case = CASES[0]
    folder = tmp_path_factory.mktemp("deferring")
    model = save_tiny(case.family, folder / "hf")
    texts = [token_ids(model, prompt + STEPS, seed=prompt)[0].tolist() for prompt in PROMPTS]
    with emulation.emulated_gpu(compute_capability=89) as gpu:
        exe = case.compile(folder)
        assert tuple(layer.placement.deferred for layer in moe_layers(exe.plan)) == (1, 1, 0)
        yield Deferring(exe, gpu, texts)
        exe.runtime.close()


@contextmanager
def fault_at_hand_out(number: int, fault: Exception) -> Iterator[None]:
    """The GPU comes to the experts' input that it hands out as number ``number``, counted from 1, and no further."""
    real: Callable[..., None] = emulation.run_kernel
    handed = 0

    def failing(kernel: GpuKernel, *args: object) -> None:
        nonlocal handed
        handed += kernel.stem.startswith("hand_out")
        if handed == number and kernel.stem.startswith("hand_out"):
            raise fault
        real(kernel, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emulation, "run_kernel", failing)
        yield
    assert handed == number


def sentences(refusal: pytest.ExceptionInfo[RuntimeRefusal]) -> int:
    text = str(refusal.value)
    assert text.endswith(".") and "\n" not in text
    return text.count(". ") + 1


@pytest.mark.slow
@pytest.mark.parametrize("hand_over", [2, 3])
def test_a_request_given_up_behind_a_deferral_leaves_the_others_alone(deferring: Deferring, hand_over: int):
    runtime = deferring.exe.runtime
    with deferring.batch(runtime) as batch:
        assert batch.decode(0) == deferring.expected[0]
        held, memory = deferring.gpu.held, runtime.stats()["arena_bytes"]
        lengths = batch.lengths
        given_up = batch.sessions[0]
        with fault_at_hand_out(hand_over, GraphEnds()), pytest.raises(RuntimeRefusal, match="hand-over") as refusal:
            runtime.decode([given_up], [7])
        assert refusal.value.status == Status.COMPUTE and sentences(refusal) == 1
        assert batch.lengths == lengths
        assert deferring.gpu.held == held and runtime.stats()["arena_bytes"] == memory
        given_up.close()
        batch.sessions[0] = batch.begun(1)
        # The two others go on beside one that took the place.
        ids = [deferring.texts[1][PROMPTS[1]], *(deferring.texts[m][PROMPTS[m] + 1] for m in (1, 2))]
        rows = [row.tobytes() for row in runtime.decode(batch.sessions, ids)]
        assert rows == [deferring.expected[0][1], *deferring.expected[1][1:]]


@pytest.mark.slow
def test_a_batch_that_fails_behind_a_deferral_is_right_the_next_time(deferring: Deferring):
    with deferring.batch(deferring.exe.runtime) as batch:
        for step in range(STEPS):
            lengths, held = batch.lengths, deferring.gpu.held
            with fault_at_hand_out(2 + step % 2, GraphEnds()), pytest.raises(RuntimeRefusal):
                batch.decode(step)
            assert batch.lengths == lengths and deferring.gpu.held == held
            assert batch.decode(step) == deferring.expected[step]


@pytest.mark.slow
def test_sequences_that_are_cut_given_up_or_closed_leave_the_others_alone(deferring: Deferring):
    runtime = deferring.exe.runtime
    with deferring.batch(runtime) as batch:
        batch.decode(0)
        batch.sessions[0].truncate(PROMPTS[0] - 1)
        tokens = batch.sessions[0].generate([7], max_new_tokens=5, ignore_eos=True)
        next(tokens)
        next(tokens)
        tokens.close()  # between two steps, as whoever hangs up
        assert batch.decode(1)[1:] == deferring.expected[1][1:]
        batch.sessions[0].truncate(PROMPTS[0] - 1)
        batch.sessions[0].prefill(deferring.texts[0][PROMPTS[0] - 1 : PROMPTS[0] + 2])
        batch.sessions[1].close()
        batch.sessions[1] = batch.begun(2)
        assert batch.decode(2)[2] == deferring.expected[2][2]


@pytest.mark.slow
def test_a_gpu_that_fails_behind_a_deferral_refuses_all_until_the_model_is_loaded_anew(deferring: Deferring):
    """As a real one's, its context is of no use any more."""
    before = deferring.gpu.held
    runtime = hetcomp.load(deferring.exe.path).runtime
    with deferring.batch(runtime) as batch:
        held = deferring.gpu.held
        with fault_at_hand_out(2, RuntimeError("a fault")), pytest.raises(RuntimeRefusal) as refusal:
            batch.decode(0)
        assert "failed" in str(refusal.value) and refusal.value.status == Status.COMPUTE
        for session in batch.sessions:
            with pytest.raises(RuntimeRefusal, match="load the model anew"):
                runtime.decode([session], [7])
        assert deferring.gpu.held == held and batch.lengths == list(PROMPTS)
    assert [str(failure) for failure in deferring.gpu.failures] == ["a fault"]
    deferring.gpu.failures.clear()
    runtime.close()
    assert deferring.gpu.held == before
    again = hetcomp.load(deferring.exe.path).runtime
    with deferring.batch(again) as batch:
        assert batch.decode(0) == deferring.expected[0]
    again.close()


def first_byte(file: Path, layer: int) -> int:
    """Where the weights of the experts of a layer begin in a file of weights."""
    with file.open("rb") as content:
        size = int.from_bytes(content.read(8), "little")
        header = json.loads(content.read(size))
    return 8 + size + min(entry["data_offsets"][0] for name, entry in header.items() if f"layers.{layer}." in name)


@pytest.mark.slow
def test_experts_that_cannot_be_read_behind_a_deferral_fail_the_step_alone(deferring: Deferring):
    """The step goes to its end with zeros for the layers behind the first one, which has deferred."""
    runtime = hetcomp.load(deferring.exe.path, weights="mmap").runtime
    file = deferring.exe.path / "weights-00001.safetensors"
    content = file.read_bytes()
    with deferring.batch(runtime) as batch:
        assert batch.decode(0) == deferring.expected[0]
        lengths, held = batch.lengths, deferring.gpu.held
        os.truncate(file, first_byte(file, layer=1))
        with pytest.raises(RuntimeRefusal, match="could not be read at byte") as refusal:
            batch.decode(1)
        assert refusal.value.status == Status.IO
        file.write_bytes(content)
        assert batch.lengths == lengths and deferring.gpu.held == held
        assert [batch.decode(step) for step in (1, 2)] == deferring.expected[1:]
    runtime.close()
