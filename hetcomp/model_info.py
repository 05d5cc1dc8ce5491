"""Facts of a loaded artifact, as the runtime library knows them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from hetcomp.runtime_abi import Handle, ModelInfoStruct, call


@dataclass(frozen=True, slots=True)
class GpuUse:
    """A GPU that computes a part: its name, its number as the driver counts, and bytes of its memory."""

    name: str
    number: int
    bytes: int


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Facts of a loaded artifact. ``context`` is in positions, ``max_batch`` in sequences, ``max_tokens`` and
    ``max_logit_rows`` in rows of one step; ``weights`` is ``ram`` or ``mmap``. ``gpu``: names of the GPUs that
    compute a part, None if the CPU computes all; ``gpu_bytes`` of their memory are the model's, ``gpus``: of each.
    ``kv_tokens``: positions that all sequences hold together, at most."""

    name: str
    architecture: str
    vocab: int
    context: int
    max_batch: int
    max_tokens: int
    max_logit_rows: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    threads: int
    isa: str
    weights: str
    has_tokenizer: bool
    has_chat_template: bool
    gpu: str | None
    gpu_bytes: int
    kv_tokens: int
    gpus: tuple[GpuUse, ...]


def model_info(handle: Handle) -> ModelInfo:
    """Of a loaded model."""
    raw = ModelInfoStruct(struct_size=ctypes.sizeof(ModelInfoStruct))
    call("hetcomp_model_get_info", handle.pointer, ctypes.byref(raw))
    return ModelInfo(
        name=raw.name.decode(),
        architecture=raw.architecture.decode(),
        vocab=raw.vocab,
        context=raw.context,
        max_batch=raw.max_batch,
        max_tokens=raw.max_tokens,
        max_logit_rows=raw.max_logit_rows,
        eos_token_ids=tuple(raw.eos_token_ids[: raw.n_eos_token_ids]),
        bos_token_id=None if raw.bos_token_id < 0 else raw.bos_token_id,
        threads=raw.threads,
        isa=raw.isa.decode(),
        weights=raw.weights.decode(),
        has_tokenizer=bool(raw.has_tokenizer),
        has_chat_template=bool(raw.has_chat_template),
        gpu=None if raw.gpu is None else raw.gpu.decode(),
        gpu_bytes=raw.gpu_bytes,
        kv_tokens=raw.kv_tokens,
        gpus=tuple(GpuUse(g.name.decode(), g.number, g.bytes) for g in (raw.gpus[: raw.n_gpus] if raw.n_gpus else ())),
    )
