"""Worker that runs a GGUF file through llama.cpp: FILE --threads N --context N [--no-repack] [--kv f32] [--lora FILE].
In the peers' environment.

The calls are those of llama-bench (low-level API, KV cache cleared before each run, micro-batch 512), but
with greedy sampling, so that every engine does the same work between two tokens.
"""

from __future__ import annotations

import argparse
import ctypes
import time

import llama_cpp
import numpy as np

from benchmarks.worker import serve


def main() -> None:
    """Serves decode, prefill, logits, all_logits and version."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--no-repack", action="store_true", help="weights as they lie in the file")
    parser.add_argument("--kv", choices=("f16", "f32"), default="f16", help="numbers of the KV cache")
    parser.add_argument("--lora", help="a GGUF file of type adapter")
    options = parser.parse_args()

    @llama_cpp.llama_log_callback
    def quiet(level: int, text: bytes, data: object) -> None:
        pass

    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model_options = llama_cpp.llama_model_default_params()
    model_options.n_gpu_layers = 0
    model_options.use_extra_bufts = not options.no_repack
    model = llama_cpp.llama_model_load_from_file(options.file.encode(), model_options)
    if not model:
        raise SystemExit(f"llama.cpp cannot load {options.file}")
    context_options = llama_cpp.llama_context_default_params()
    context_options.n_ctx = options.context
    context_options.n_batch = context_options.n_ubatch = 512
    context_options.n_threads = context_options.n_threads_batch = options.threads
    if options.kv == "f32":
        context_options.type_k = context_options.type_v = llama_cpp.GGML_TYPE_F32
    context = llama_cpp.llama_init_from_model(model, context_options)
    if not context:
        raise SystemExit(f"llama.cpp cannot make a context of {options.context} tokens")
    if options.lora:
        lora = llama_cpp.llama_adapter_lora_init(model, options.lora.encode())
        if not lora:
            raise SystemExit(f"llama.cpp cannot load the adapter {options.lora}")
        llama_cpp.llama_set_adapters_lora(
            context, (llama_cpp.llama_adapter_lora_p_ctypes * 1)(lora), 1, (ctypes.c_float * 1)(1.0)
        )
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def step(ids: list[int]) -> np.ndarray:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        status = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, len(ids)))
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), shape=(vocab,))

    def start(prompt: list[int]) -> np.ndarray:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        return step(prompt)

    def decode(prompt: list[int], tokens: int) -> float:
        """Tokens per second after the prompt and the first token."""
        token = int(start(prompt).argmax())
        begin = time.perf_counter()
        for _ in range(tokens):
            token = int(step([token]).argmax())
        return tokens / (time.perf_counter() - begin)

    def prefill(prompt: list[int]) -> float:
        """Prompt tokens per second until the first token is there."""
        begin = time.perf_counter()
        start(prompt).argmax()
        return len(prompt) / (time.perf_counter() - begin)

    def logits(prompt: list[int]) -> list[float]:
        """Logits after the prompt."""
        return [float(x) for x in start(prompt)]

    def all_logits(prompt: list[int], file: str) -> None:
        """Writes the logits after each token of the prompt (at most 512) to a .npy file: f32 [tokens, vocab]."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch = llama_cpp.llama_batch_init(len(prompt), 0, 1)
        batch.n_tokens = len(prompt)
        for i, token in enumerate(prompt):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, True
            batch.seq_id[i][0] = 0
        status = llama_cpp.llama_decode(context, batch)
        llama_cpp.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        np.save(file, np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(len(prompt), vocab)))

    def version() -> dict[str, str]:
        system = llama_cpp.llama_print_system_info().decode().strip()
        return {"llama_cpp_python": llama_cpp.__version__, "llama.cpp system": system}

    serve({"decode": decode, "prefill": prefill, "logits": logits, "all_logits": all_logits, "version": version})


if __name__ == "__main__":
    main()
