"""ctypes declarations of the C ABI (``hetcomp/hetcomp.h``), and its statuses as exceptions."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping
from enum import IntEnum
from functools import cache
from typing import Any, NoReturn

from hetcomp import installed_runtime
from hetcomp.errors import HetcompError


class Status(IntEnum):
    """hetcomp_status."""

    OK = 0
    INVALID_ARGUMENT = 1
    NOT_FOUND = 2
    BAD_ARTIFACT = 3
    NEWER_SCHEMA = 4
    MISSING_ISA = 5
    OUT_OF_MEMORY = 6
    CONTEXT_FULL = 7
    NO_FREE_SLOT = 8
    NO_TOKENIZER = 9
    COMPUTE = 10
    IO = 11
    INTERNAL = 12
    POOL_FULL = 13


class RuntimeRefusal(HetcompError):
    """A call of the runtime that failed; ``status`` says of which kind."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


class LoadOptionsStruct(ctypes.Structure):
    """hetcomp_load_options."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("threads", ctypes.c_int32),
        ("weights", ctypes.c_int32),
        ("verify_weights", ctypes.c_int32),
        ("isa", ctypes.c_char_p),
        ("n_gpus", ctypes.c_int32),
        ("gpus", ctypes.POINTER(ctypes.c_int32)),
    )


class GpuUseStruct(ctypes.Structure):
    """hetcomp_gpu_use."""

    _fields_ = (("name", ctypes.c_char_p), ("number", ctypes.c_int32), ("bytes", ctypes.c_int64))


class ModelInfoStruct(ctypes.Structure):
    """hetcomp_model_info."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("vocab", ctypes.c_int32),
        ("context", ctypes.c_int64),
        ("max_batch", ctypes.c_int32),
        ("max_tokens", ctypes.c_int32),
        ("max_logit_rows", ctypes.c_int32),
        ("bos_token_id", ctypes.c_int32),
        ("n_eos_token_ids", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("has_tokenizer", ctypes.c_int32),
        ("has_chat_template", ctypes.c_int32),
        ("eos_token_ids", ctypes.POINTER(ctypes.c_int32)),
        ("name", ctypes.c_char_p),
        ("architecture", ctypes.c_char_p),
        ("isa", ctypes.c_char_p),
        ("weights", ctypes.c_char_p),
        ("gpu", ctypes.c_char_p),
        ("gpu_bytes", ctypes.c_int64),
        ("gpus", ctypes.POINTER(GpuUseStruct)),
        ("n_gpus", ctypes.c_int32),
        ("kv_tokens", ctypes.c_int64),
    )


class GenerateParamsStruct(ctypes.Structure):
    """hetcomp_generate_params."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("ignore_eos", ctypes.c_int32),
        ("max_new_tokens", ctypes.c_int64),
        ("temperature", ctypes.c_double),
        ("top_k", ctypes.c_int32),
        ("n_stop", ctypes.c_int32),
        ("top_p", ctypes.c_double),
        ("min_p", ctypes.c_double),
        ("repetition_penalty", ctypes.c_double),
        ("seed", ctypes.c_uint64),
        ("stop", ctypes.POINTER(ctypes.c_char_p)),
    )


class TokenStruct(ctypes.Structure):
    """hetcomp_token."""

    _fields_ = (
        ("id", ctypes.c_int32),
        ("finish", ctypes.c_int32),
        ("text", ctypes.c_void_p),
        ("text_length", ctypes.c_size_t),
    )


class RoutingStruct(ctypes.Structure):
    """hetcomp_routing."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("decode", ctypes.c_int32),
        ("n_tokens", ctypes.c_int64),
        ("n_layers", ctypes.c_int32),
        ("top_k", ctypes.c_int32),
        ("positions", ctypes.POINTER(ctypes.c_int32)),
        ("slots", ctypes.POINTER(ctypes.c_int32)),
        ("experts", ctypes.POINTER(ctypes.c_int32)),
        ("weights", ctypes.POINTER(ctypes.c_float)),
    )


# hetcomp_routing_callback
RoutingCallback = ctypes.CFUNCTYPE(None, ctypes.POINTER(RoutingStruct), ctypes.c_void_p)


class LaneEventStruct(ctypes.Structure):
    """hetcomp_lane_event."""

    _fields_ = (
        ("ns", ctypes.c_int64),
        ("thread", ctypes.c_int32),
        ("call", ctypes.c_int32),
        ("timer", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class GpuEventStruct(ctypes.Structure):
    """hetcomp_gpu_event."""

    _fields_ = (
        ("begin_ns", ctypes.c_int64),
        ("end_ns", ctypes.c_int64),
        ("gpu", ctypes.c_int32),
        ("work", ctypes.c_int32),
        ("layer", ctypes.c_int32),
        ("launches", ctypes.c_int32),
        ("bytes", ctypes.c_int64),
        ("kernel", ctypes.c_char_p),
        ("role", ctypes.c_char_p),
    )


class StepTraceStruct(ctypes.Structure):
    """hetcomp_step_trace."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("decode", ctypes.c_int32),
        ("n_tokens", ctypes.c_int64),
        ("position", ctypes.c_int64),
        ("begin_ns", ctypes.c_int64),
        ("end_ns", ctypes.c_int64),
        ("n_events", ctypes.c_int64),
        ("dropped", ctypes.c_int64),
        ("events", ctypes.POINTER(LaneEventStruct)),
        ("n_gpu_events", ctypes.c_int64),
        ("gpu_events", ctypes.POINTER(GpuEventStruct)),
    )


# hetcomp_lane_trace_callback
LaneTraceCallback = ctypes.CFUNCTYPE(None, ctypes.POINTER(StepTraceStruct), ctypes.c_void_p)

_POINTER = ctypes.c_void_p
_FLAG = ctypes.c_int
_OUT = ctypes.POINTER(ctypes.c_void_p)
_SIZE_OUT = ctypes.POINTER(ctypes.c_size_t)
_INT64_OUT = ctypes.POINTER(ctypes.c_int64)

# Arguments of every function that returns a status.
_FUNCTIONS: Mapping[str, tuple[Any, ...]] = {
    "hetcomp_load": (ctypes.c_char_p, ctypes.POINTER(LoadOptionsStruct), _OUT),
    "hetcomp_model_get_info": (_POINTER, ctypes.POINTER(ModelInfoStruct)),
    "hetcomp_model_stats": (_POINTER, _OUT),
    "hetcomp_model_count_experts": (_POINTER, ctypes.c_int64),
    "hetcomp_model_expert_statistics": (_POINTER, _OUT),
    "hetcomp_session_expert_statistics": (_POINTER, _OUT),
    "hetcomp_model_reset_stats": (_POINTER,),
    "hetcomp_model_set_deferral": (_POINTER, ctypes.c_int),
    "hetcomp_model_set_routing_callback": (_POINTER, RoutingCallback, _POINTER),
    "hetcomp_model_replay_routing": (_POINTER, ctypes.c_int32, ctypes.c_int64, ctypes.c_int32, _POINTER, _POINTER),
    "hetcomp_model_set_lane_trace_callback": (_POINTER, LaneTraceCallback, _POINTER),
    "hetcomp_adapter_load": (_POINTER, ctypes.c_char_p, ctypes.c_char_p),
    "hetcomp_adapter_unload": (_POINTER, ctypes.c_char_p),
    "hetcomp_adapter_list": (_POINTER, _OUT),
    "hetcomp_session_set_adapter": (_POINTER, ctypes.c_char_p),
    "hetcomp_session_create": (_POINTER, _OUT),
    "hetcomp_session_truncate": (_POINTER, ctypes.c_int64),
    "hetcomp_session_length": (_POINTER, _INT64_OUT),
    "hetcomp_session_reuse": (_POINTER, _POINTER, ctypes.c_int64, _INT64_OUT),
    "hetcomp_forward": (_POINTER, _POINTER, ctypes.c_int64, _POINTER),
    "hetcomp_prefill": (_POINTER, _POINTER, ctypes.c_int64, _POINTER),
    "hetcomp_decode": (_POINTER, _POINTER, _POINTER, ctypes.c_int64, _POINTER),
    "hetcomp_generation_start": (_POINTER, _POINTER, ctypes.c_int64, ctypes.POINTER(GenerateParamsStruct), _OUT),
    "hetcomp_generation_next": (_POINTER, ctypes.POINTER(TokenStruct)),
    "hetcomp_tokenize": (
        _POINTER,
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        _OUT,
        _SIZE_OUT,
    ),
    "hetcomp_detokenize": (_POINTER, _POINTER, ctypes.c_size_t, _FLAG, _OUT, _SIZE_OUT),
    "hetcomp_chat_render": (_POINTER, ctypes.c_char_p, ctypes.c_size_t, _OUT, _SIZE_OUT),
}
_FREE_FUNCTIONS = ("hetcomp_model_free", "hetcomp_session_free", "hetcomp_generation_free", "hetcomp_free")


@cache
def library() -> ctypes.CDLL:
    """The loaded library. Raises HetcompError if it is missing or cannot be loaded."""
    path = installed_runtime.library()
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise HetcompError(f"Cannot load the runtime {path}: {error}. Install hetcomp again.") from error
    for name, arguments in _FUNCTIONS.items():
        getattr(loaded, name).argtypes = arguments
        getattr(loaded, name).restype = ctypes.c_int
    for name in _FREE_FUNCTIONS:
        getattr(loaded, name).argtypes = (ctypes.c_void_p,)
        getattr(loaded, name).restype = None
    loaded.hetcomp_last_error.restype = ctypes.c_char_p
    loaded.hetcomp_version.restype = ctypes.c_char_p
    return loaded


def call(name: str, *arguments: object) -> None:
    """Calls a function that returns a status; raises RuntimeRefusal with its sentence."""
    loaded = library()
    status = getattr(loaded, name)(*arguments)
    if status != Status.OK:
        raise RuntimeRefusal(Status(status), loaded.hetcomp_last_error().decode(errors="replace"))


def refuse(message: str) -> NoReturn:
    """Raises RuntimeRefusal for an argument that the library never sees."""
    raise RuntimeRefusal(Status.INVALID_ARGUMENT, message)


class Handle:
    """Owns a pointer of the library and frees it once, at the latest when it is collected."""

    def __init__(self, pointer: int | None, free: str) -> None:
        self._pointer = pointer
        self._finalizer = weakref.finalize(self, getattr(library(), free), pointer)
        # The system takes everything back at exit; lanes must not be joined while Python shuts down.
        self._finalizer.atexit = False

    @property
    def pointer(self) -> int:
        if self._pointer is None or not self._finalizer.alive:
            refuse("This object has been closed.")
        return self._pointer

    def close(self) -> None:
        self._finalizer()


def owned_bytes(pointer: ctypes.c_void_p, length: int) -> bytes:
    """Copies ``length`` bytes at ``pointer`` and frees them."""
    try:
        return ctypes.string_at(pointer, length)
    finally:
        library().hetcomp_free(pointer)
