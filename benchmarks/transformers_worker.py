"""Worker that runs a checkpoint through transformers: FOLDER --threads N --experts grouped_mm --dtype
bfloat16.
"""

from __future__ import annotations

import argparse
import time

import torch
import transformers

from benchmarks.worker import serve


def main() -> None:
    """Serves decode, prefill, logits and version. Uncompiled (eager) torch, SDPA attention, greedy."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--experts", default="grouped_mm")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.folder, dtype=getattr(torch, options.dtype), experts_implementation=options.experts
    ).eval()

    def step(ids: torch.Tensor, cache: transformers.DynamicCache) -> torch.Tensor:
        return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]

    @torch.inference_mode()
    def decode(prompt: list[int], tokens: int) -> float:
        """Tokens per second after the prompt and the first token."""
        cache = transformers.DynamicCache(config=model.config)
        token = step(torch.tensor([prompt]), cache).argmax()
        start = time.perf_counter()
        for _ in range(tokens):
            token = step(token.reshape(1, 1), cache).argmax()
        return tokens / (time.perf_counter() - start)

    @torch.inference_mode()
    def prefill(prompt: list[int]) -> float:
        """Prompt tokens per second until the first token is there."""
        start = time.perf_counter()
        step(torch.tensor([prompt]), transformers.DynamicCache(config=model.config)).argmax()
        return len(prompt) / (time.perf_counter() - start)

    @torch.inference_mode()
    def logits(prompt: list[int]) -> list[float]:
        """Logits after the prompt."""
        cache = transformers.DynamicCache(config=model.config)
        return [float(x) for x in step(torch.tensor([prompt]), cache).float()]

    serve(
        {
            "decode": decode,
            "prefill": prefill,
            "logits": logits,
            "version": lambda: {"transformers": transformers.__version__, "torch": torch.__version__},
        }
    )


if __name__ == "__main__":
    main()
