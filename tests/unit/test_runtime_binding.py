"""The Python binding and hetcomp-run, over an artifact whose results numpy computes exactly."""

from __future__ import annotations

import gc
import hashlib
import json
import signal
import subprocess
import threading
import time
from ctypes.util import find_library
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from hetcomp import installed_runtime
from hetcomp.errors import HetcompError
from hetcomp.runtime import Finish, Runtime, RuntimeRefusal, Status, version
from tests.reference.fake_artifact import CONTEXT, VOCAB, FakeModel, build_program, write_artifact

PROMPT = [50, 3888, 874, 264, 721, 99, 4000, 17, 3]
MODEL = FakeModel()


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    return build_program(tmp_path_factory.mktemp("program"))


@pytest.fixture(scope="module")
def artifact(program, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "fake.hetc"
    write_artifact(folder, program)
    return folder


@pytest.fixture(scope="module")
def runtime(artifact) -> Runtime:
    return Runtime.load(artifact)


def texts(tokens) -> str:
    return "".join(token.text for token in tokens)


def test_info_and_version(runtime):
    assert runtime.info.vocab == VOCAB and runtime.info.context == CONTEXT
    assert runtime.info.isa == "avx2" and runtime.info.threads >= 1
    assert runtime.info.eos_token_ids == (2,) and runtime.info.bos_token_id is None
    assert runtime.info.has_tokenizer and runtime.info.has_chat_template
    assert runtime.info.gpu is None and runtime.info.gpu_bytes == 0 and runtime.info.gpus == ()
    assert "gpu" not in runtime.stats()
    assert version().count(".") == 2


@pytest.mark.parametrize("n", [1, 5, 7, 8, 33])
@pytest.mark.parametrize("weights", ["mmap", "ram"])
def test_forward_is_exact_over_step_borders(artifact, n, weights):
    ids = np.random.default_rng(n).integers(100, VOCAB, n)
    logits = Runtime.load(artifact, weights=weights, threads=1).forward(ids)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, MODEL.logits(ids.tolist()))


def test_deferral_changes_nothing_where_the_plan_has_none(artifact):
    runtime = Runtime.load(artifact)
    for which in ("all", "none", "generated"):
        runtime.set_deferral(which)
        np.testing.assert_array_equal(runtime.forward([60, 61]), MODEL.logits([60, 61]))
    with pytest.raises(RuntimeRefusal, match="not 'some'"):
        runtime.set_deferral("some")


def test_sessions_and_batched_decode(runtime):
    with runtime.session() as a, runtime.session() as b:
        np.testing.assert_array_equal(a.prefill(PROMPT), MODEL.logits(PROMPT)[-1])
        np.testing.assert_array_equal(b.forward([60, 61]), MODEL.logits([60, 61]))
        rows = runtime.decode([b, a], [62, 70])
        np.testing.assert_array_equal(rows[0], MODEL.logits([60, 61, 62])[-1])
        np.testing.assert_array_equal(rows[1], MODEL.logits([*PROMPT, 70])[-1])
        assert (len(a), len(b)) == (10, 3)
        b.truncate(1)
        np.testing.assert_array_equal(b.prefill([90]), MODEL.logits([60, 90])[-1])
        assert a.reuse([*PROMPT[:4], 1, 2]) == 4 and len(a) == 4
        with pytest.raises(HetcompError, match="All 2 sequences"):
            runtime.session()
    with runtime.session() as again:
        assert len(again) == 0
    with pytest.raises(HetcompError, match="closed"):
        len(again)


def test_greedy_generation(runtime):
    tokens = list(runtime.generate(PROMPT, max_new_tokens=20, ignore_eos=True))
    assert [token.id for token in tokens] == MODEL.greedy(PROMPT, 20)
    assert texts(tokens) == runtime.detokenize([token.id for token in tokens])
    assert [token.finish for token in tokens] == [Finish.NONE] * 19 + [Finish.LENGTH]
    assert list(runtime.generate(PROMPT, max_new_tokens=0)) == []


def test_generation_fills_the_context(runtime):
    tokens = list(runtime.generate(PROMPT, max_new_tokens=1000, ignore_eos=True))
    assert len(tokens) == CONTEXT - len(PROMPT) + 1
    assert tokens[-1].finish is Finish.CONTEXT


def test_same_seed_same_tokens(runtime):
    def draw(seed: int) -> list[int]:
        sampling = {"temperature": 60.0, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1}
        return [t.id for t in runtime.generate(PROMPT, max_new_tokens=30, seed=seed, ignore_eos=True, **sampling)]

    assert draw(3) == draw(3)
    assert len({tuple(draw(seed)) for seed in range(5)}) > 1


def test_text_is_whole_and_stops_wherever_token_borders_are(runtime):
    """Random tokens are full of broken characters and odd borders."""
    for seed in range(4):
        sampling = {"max_new_tokens": 40, "temperature": 1e6, "seed": seed, "ignore_eos": True}
        tokens = list(runtime.generate(PROMPT, **sampling))
        whole = texts(tokens)
        assert whole == runtime.detokenize([token.id for token in tokens])
        for begin, length in ((3, 1), (10, 4), (25, 9)):
            stop = whole[begin : begin + length]
            stopped = list(runtime.generate(PROMPT, **sampling, stop=[stop, "never in it"]))
            assert texts(stopped) == whole[: whole.index(stop)]
            assert stopped[-1].finish is Finish.STOP
            assert [t.id for t in stopped] == [t.id for t in tokens[: len(stopped)]]


def test_a_closed_or_dropped_generator_frees_its_sequence(runtime):
    for _ in range(5):
        closed = runtime.generate(PROMPT)
        next(closed)
        closed.close()
        dropped = runtime.generate(PROMPT)
        next(dropped)
        never_started = runtime.generate(PROMPT)
        del dropped, never_started
        gc.collect()
    assert runtime.forward(PROMPT).shape == (len(PROMPT), VOCAB)


def test_generation_outlives_the_references_to_its_model(artifact):
    tokens = Runtime.load(artifact).generate(PROMPT, max_new_tokens=5, ignore_eos=True)
    gc.collect()
    assert [token.id for token in tokens] == MODEL.greedy(PROMPT, 5)


def test_threads_share_a_runtime(runtime):
    wrong: list[int] = []

    def work(first: int) -> None:
        for round in range(10):
            ids = [first + round, *PROMPT]
            if not np.array_equal(runtime.forward(ids), MODEL.logits(ids)):
                wrong.append(first)

    threads = [threading.Thread(target=work, args=(1000 * i,)) for i in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("call", "status", "words"),
    [
        (lambda r: r.forward([]), Status.INVALID_ARGUMENT, "no tokens"),
        (lambda r: r.forward([VOCAB]), Status.INVALID_ARGUMENT, f"0 to {VOCAB - 1}"),
        (lambda r: r.forward([-1]), Status.INVALID_ARGUMENT, "Token id -1"),
        (lambda r: r.forward([2**40]), Status.INVALID_ARGUMENT, "outside"),
        (lambda r: r.forward([[1, 2]]), Status.INVALID_ARGUMENT, "flat list"),
        (lambda r: r.forward([0.5]), Status.INVALID_ARGUMENT, "whole numbers"),
        (lambda r: r.forward([1] * (CONTEXT + 1)), Status.CONTEXT_FULL, "larger --context"),
        (lambda r: r.generate([1] * (CONTEXT + 1)), Status.CONTEXT_FULL, "larger --context"),
        (lambda r: r.generate([1], temperature=-1.0), Status.INVALID_ARGUMENT, "temperature"),
        (lambda r: r.generate([1], top_k=-1), Status.INVALID_ARGUMENT, "top_k"),
        (lambda r: r.generate([1], top_k=2**40), Status.INVALID_ARGUMENT, "top_k"),
        (lambda r: r.generate([1], seed=-1), Status.INVALID_ARGUMENT, "seed"),
        (lambda r: r.generate([1], max_new_tokens=-1), Status.INVALID_ARGUMENT, "max_new_tokens"),
        (lambda r: r.generate([1], stop=[""]), Status.INVALID_ARGUMENT, "empty"),
        (lambda r: r.generate([1], stop=["a\0"]), Status.INVALID_ARGUMENT, "NUL"),
        (lambda r: r.tokenize("\ud800"), Status.INVALID_ARGUMENT, "surrogate"),
        (lambda r: list(r.generate([14])), Status.COMPUTE, "not finite"),
        (lambda r: r.forward([13]), Status.COMPUTE, "error 13"),
    ],
)
def test_refusals(runtime, call, status, words):
    with pytest.raises(RuntimeRefusal, match=words) as refusal:
        call(runtime)
    assert refusal.value.status is status
    assert runtime.forward([20]).shape == (1, VOCAB)  # nothing is left behind


def test_load_refusals(artifact, tmp_path):
    for arguments, words in (
        ({"weights": "disk"}, "auto, mmap or ram"),
        ({"threads": -1}, "threads"),
        ({"threads": 9999}, "may use"),
        ({"gpus": (0, -1)}, "gpus"),
        ({"isa": "avx512"}, "no program for avx512"),
    ):
        with pytest.raises(HetcompError, match=words):
            Runtime.load(artifact, **arguments)
    with pytest.raises(HetcompError, match="not a folder"):
        Runtime.load(tmp_path / "nothing")
    with pytest.raises(HetcompError, match=r"no manifest\.json"):
        Runtime.load(tmp_path)


def test_a_model_without_texts(program, tmp_path):
    write_artifact(tmp_path / "bare.hetc", program, text=False)
    bare = Runtime.load(tmp_path / "bare.hetc")
    assert [t.id for t in bare.generate(PROMPT, max_new_tokens=3, ignore_eos=True)] == MODEL.greedy(PROMPT, 3)
    for call in (
        lambda: bare.tokenize("a"),
        lambda: bare.detokenize([1]),
        lambda: bare.chat_render([{"role": "user", "content": "a"}]),
        lambda: bare.generate([1], stop=["a"]),
    ):
        with pytest.raises(RuntimeRefusal) as refusal:
            call()
        assert refusal.value.status is Status.NO_TOKENIZER


def test_tokenize_and_chat(runtime):
    for text in ("", "Hello, wörld! 你好 🙂", "a\0b"):
        assert runtime.detokenize(runtime.tokenize(text, add_special=False)) == text
    rendered = runtime.chat_render([{"role": "user", "content": "hi"}])
    assert "hi" in rendered and rendered != runtime.chat_render(
        [{"role": "user", "content": "hi"}], add_generation_prompt=False
    )


def test_stats(artifact):
    runtime = Runtime.load(artifact)
    list(runtime.generate(PROMPT, max_new_tokens=4, ignore_eos=True))
    stats = runtime.stats()
    assert stats["prefill"]["tokens"] == len(PROMPT) and stats["prefill"]["steps"] == 2
    assert stats["decode"]["tokens"] == 3 and stats["decode"]["tokens_per_second"] > 0
    assert set(stats["decode"]["timers_ms"]) == {"append", "logits"}
    runtime.reset_stats()
    assert runtime.stats()["decode"]["tokens"] == 0


# ---- the executable


def run(*arguments: object, input: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [str(installed_runtime.executable()), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, input=input)


IDS = ",".join(map(str, PROMPT))


def test_executable_says_what_python_says(artifact, runtime):
    tokens = list(runtime.generate(PROMPT, max_new_tokens=12))
    done = run(artifact, "--ids", IDS, "-n", 12, "--print-ids")
    assert (done.returncode, done.stdout) == (0, ",".join(str(t.id) for t in tokens) + "\n")
    assert run(artifact, "--ids", IDS, "-n", 12).stdout == texts(tokens) + "\n"
    sampling = {"temperature": 50.0, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "seed": 7, "repetition_penalty": 1.2}
    flags = [part for key, value in sampling.items() for part in (f"--{key.replace('_', '-')}", value)]
    tokens = list(runtime.generate(runtime.tokenize("Hello"), max_new_tokens=12, ignore_eos=True, **sampling))
    assert run(artifact, "--prompt", "Hello", "-n", 12, "--ignore-eos", *flags).stdout == texts(tokens) + "\n"


def test_executable_stats(artifact):
    done = run(artifact, "--ids", IDS, "-n", 3, "--ignore-eos", "--stats", "--threads", 1, "--weights", "mmap")
    stats = json.loads(done.stderr)
    assert stats["threads"] == 1 and stats["weights"] == "mmap" and stats["decode"]["tokens"] == 2


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--ids", "1,x"), 2, "not a token id"),
        (("--ids", ""), 2, "not a token id"),
        (("--ids", "1", "--prompt", "a"), 2, "Exactly 1"),
        ((), 2, "--ids,--prompt,--chat"),
        (("--ids", "1", "--weights", "disk"), 2, "weights"),
        (("--ids", "1", "--gpu", "x"), 2, "gpu"),
        (("--ids", "1", "--top-p", "2"), 1, "top_p"),
        (("--ids", "8192"), 1, "outside the vocabulary"),
        (("--ids", "14"), 1, "not finite"),
        (("--ids", "1", "--isa", "avx512"), 1, "no program for avx512"),
        (("--prompt", b"\xff"), 1, "UTF-8"),
    ],
)
def test_executable_refuses_with_one_sentence(artifact, arguments, code, words):
    command = [str(installed_runtime.executable()), str(artifact), *arguments]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert done.returncode == code and done.stdout == b""
    message = done.stderr.decode()
    assert message.startswith("hetcomp-run: ") and message.count("\n") == 1 and words in message


@pytest.mark.skipif(find_library("cuda") is not None, reason="this machine has a driver")
def test_executable_refuses_gpu_code_without_a_driver(program, tmp_path):
    folder = tmp_path / "gpu.hetc"
    write_artifact(folder, program)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "gpu").mkdir()
    for name in ("gpu/program.json", "gpu/kernels.json"):
        (folder / name).write_text("{}")
        manifest["files"][name] = {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    manifest["gpus"] = [{"device": "gpu:0", "program": "gpu/program.json", "weight_files": []}]
    manifest["pinned"] = []
    (folder / "manifest.json").write_text(json.dumps(manifest))
    done = run(folder, "--ids", IDS, "--gpu", 1)
    assert (done.returncode, done.stdout) == (1, "")
    assert "There is no NVIDIA driver (libcuda.so.1" in done.stderr and done.stderr.count("\n") == 1


def test_chat_computes_only_what_is_new(artifact, runtime):
    done = run(artifact, "--chat", "-n", 4, "--stats", "--ignore-eos", input="one\ntwo\n")
    assert done.returncode == 0
    messages = [{"role": "user", "content": "one"}]
    prompts, answers = [], []
    for line in ("two", None):
        prompts.append(runtime.tokenize(runtime.chat_render(messages), add_special=False))
        answers.append(texts(runtime.generate(prompts[-1], max_new_tokens=4, ignore_eos=True)))
        messages.append({"role": "assistant", "content": answers[-1]})
        if line is not None:
            messages.append({"role": "user", "content": line})
    assert done.stdout == "".join(answer + "\n" for answer in answers)
    assert json.loads(done.stderr)["prefill"]["tokens"] < sum(map(len, prompts))


def test_ctrl_c_ends_the_executable(artifact):
    command = [str(installed_runtime.executable()), str(artifact), "--chat"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(1.0)  # it waits for a line of its user
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=20)
    assert (child.returncode, errors) == (130, b"")


def test_repetition_penalty_reaches_the_sampler(runtime):
    tokens = runtime.generate(PROMPT, max_new_tokens=20, repetition_penalty=1000.0, ignore_eos=True)
    penalised = [token.id for token in tokens]
    assert all(a != b for a, b in pairwise(penalised))
    assert not set(penalised) & set(PROMPT)
