"""The runtime library from Python: ctypes over the C ABI of ``hetcomp/hetcomp.h``.

Only numpy is needed. All work happens in the library; a step releases the interpreter lock, and between two
steps Python code runs, so that Ctrl-C and a closed iterator end a generation at once.
"""

from __future__ import annotations

import ctypes
import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from hetcomp import installed_runtime
from hetcomp.errors import HetcompError

_WEIGHTS = {"auto": 0, "mmap": 1, "ram": 2}
_NOTHING_GENERATED = -1

IdsLike = Sequence[int] | NDArray[np.integer[Any]]


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


class Finish(IntEnum):
    """hetcomp_finish: why a token is the last one."""

    NONE = 0
    EOS = 1
    LENGTH = 2
    STOP = 3
    CONTEXT = 4
    CALLBACK = 5


class RuntimeRefusal(HetcompError):
    """A call of the runtime that failed; ``status`` says of which kind."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token. ``text`` is what became complete with it (maybe nothing; all texts together are the
    whole text), ``finish`` is not NONE for the last one."""

    id: int
    text: str
    finish: Finish = Finish.NONE


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Facts of a loaded artifact. ``context`` is in positions, ``max_batch`` in sequences, ``max_tokens`` and
    ``max_logit_rows`` in rows of one step; ``weights`` is ``ram`` or ``mmap``."""

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


class _LoadOptions(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("threads", ctypes.c_int32),
        ("weights", ctypes.c_int32),
        ("verify_weights", ctypes.c_int32),
        ("isa", ctypes.c_char_p),
    )


class _ModelInfo(ctypes.Structure):
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
    )


class _GenerateParams(ctypes.Structure):
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


class _Token(ctypes.Structure):
    _fields_ = (
        ("id", ctypes.c_int32),
        ("finish", ctypes.c_int32),
        ("text", ctypes.c_void_p),
        ("text_length", ctypes.c_size_t),
    )


_POINTER = ctypes.c_void_p
_FLAG = ctypes.c_int
_OUT = ctypes.POINTER(ctypes.c_void_p)
_SIZE_OUT = ctypes.POINTER(ctypes.c_size_t)
_INT64_OUT = ctypes.POINTER(ctypes.c_int64)

# Arguments of every function that returns a status.
_FUNCTIONS: Mapping[str, tuple[Any, ...]] = {
    "hetcomp_load": (ctypes.c_char_p, ctypes.POINTER(_LoadOptions), _OUT),
    "hetcomp_model_get_info": (_POINTER, ctypes.POINTER(_ModelInfo)),
    "hetcomp_model_stats": (_POINTER, _OUT),
    "hetcomp_model_reset_stats": (_POINTER,),
    "hetcomp_session_create": (_POINTER, _OUT),
    "hetcomp_session_truncate": (_POINTER, ctypes.c_int64),
    "hetcomp_session_length": (_POINTER, _INT64_OUT),
    "hetcomp_session_reuse": (_POINTER, _POINTER, ctypes.c_int64, _INT64_OUT),
    "hetcomp_forward": (_POINTER, _POINTER, ctypes.c_int64, _POINTER),
    "hetcomp_prefill": (_POINTER, _POINTER, ctypes.c_int64, _POINTER),
    "hetcomp_decode": (_POINTER, _POINTER, _POINTER, ctypes.c_int64, _POINTER),
    "hetcomp_generation_start": (_POINTER, _POINTER, ctypes.c_int64, ctypes.POINTER(_GenerateParams), _OUT),
    "hetcomp_generation_next": (_POINTER, ctypes.POINTER(_Token)),
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
def _library() -> ctypes.CDLL:
    path = installed_runtime.library()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise HetcompError(f"Cannot load the runtime {path}: {error}. Install hetcomp again.") from error
    for name, arguments in _FUNCTIONS.items():
        getattr(library, name).argtypes = arguments
        getattr(library, name).restype = ctypes.c_int
    for name in _FREE_FUNCTIONS:
        getattr(library, name).argtypes = (ctypes.c_void_p,)
        getattr(library, name).restype = None
    library.hetcomp_last_error.restype = ctypes.c_char_p
    library.hetcomp_version.restype = ctypes.c_char_p
    return library


def version() -> str:
    """Version of the runtime library."""
    text: bytes = _library().hetcomp_version()
    return text.decode()


def _call(name: str, *arguments: object) -> None:
    library = _library()
    status = getattr(library, name)(*arguments)
    if status != Status.OK:
        raise RuntimeRefusal(Status(status), library.hetcomp_last_error().decode(errors="replace"))


def _refuse(message: str) -> NoReturn:
    raise RuntimeRefusal(Status.INVALID_ARGUMENT, message)


def _check_range(name: str, value: int, low: int, high: int) -> None:
    """ctypes would cut a number that does not fit."""
    if not low <= value <= high:
        _refuse(f"{name} must be from {low} to {high}, not {value}.")


def _ids(ids: IdsLike) -> NDArray[np.int32]:
    """One row of token ids as int32, contiguous."""
    array = np.asarray(ids)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        _refuse(f"Token ids must be a flat list of whole numbers, not {array.dtype} of shape {array.shape}.")
    if array.size and (int(array.min()) < -(2**31) or int(array.max()) >= 2**31):
        _refuse(f"Token id {int(array.max())} is outside of every vocabulary.")
    return np.ascontiguousarray(array, dtype=np.int32)


class _Handle:
    """Owns a pointer of the library and frees it once, at the latest when it is collected."""

    def __init__(self, pointer: int | None, free: str) -> None:
        self._pointer = pointer
        self._finalizer = weakref.finalize(self, getattr(_library(), free), pointer)
        # The system takes everything back at exit; lanes must not be joined while Python shuts down.
        self._finalizer.atexit = False

    @property
    def pointer(self) -> int:
        if self._pointer is None or not self._finalizer.alive:
            _refuse("This object has been closed.")
        return self._pointer

    def close(self) -> None:
        self._finalizer()


def _owned_bytes(pointer: ctypes.c_void_p, length: int) -> bytes:
    """Copies ``length`` bytes at ``pointer`` and frees them."""
    try:
        return ctypes.string_at(pointer, length)
    finally:
        _library().hetcomp_free(pointer)


class Session:
    """One sequence with its place in the KV cache. Use from one thread at a time; close it when done."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        out = ctypes.c_void_p()
        _call("hetcomp_session_create", runtime._handle.pointer, ctypes.byref(out))
        self._handle = _Handle(out.value, "hetcomp_session_free")

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the sequence's place. Closing twice does nothing."""
        self._handle.close()

    def __len__(self) -> int:
        length = ctypes.c_int64()
        _call("hetcomp_session_length", self._handle.pointer, ctypes.byref(length))
        return length.value

    def reset(self) -> None:
        """Forgets all tokens."""
        self.truncate(0)

    def truncate(self, length: int) -> None:
        """Keeps the first ``length`` tokens. Raises HetcompError if there are fewer."""
        _check_range("length", length, 0, 2**63 - 1)
        _call("hetcomp_session_truncate", self._handle.pointer, length)

    def reuse(self, ids: IdsLike) -> int:
        """Truncates to the longest common prefix with ``ids`` (at most all but one); returns its length."""
        array = _ids(ids)
        kept = ctypes.c_int64()
        _call("hetcomp_session_reuse", self._handle.pointer, array.ctypes.data, array.size, ctypes.byref(kept))
        return kept.value

    def forward(self, ids: IdsLike) -> NDArray[np.float32]:
        """Appends ``ids`` (T) and returns the logits of each, float32 [T, vocab]. Raises HetcompError."""
        array = _ids(ids)
        logits = np.empty((array.size, self.runtime.info.vocab), np.float32)
        _call("hetcomp_forward", self._handle.pointer, array.ctypes.data, array.size, logits.ctypes.data)
        return logits

    def prefill(self, ids: IdsLike) -> NDArray[np.float32]:
        """Appends ``ids`` and returns the logits of the last, float32 [vocab]. Raises HetcompError."""
        array = _ids(ids)
        logits = np.empty(self.runtime.info.vocab, np.float32)
        _call("hetcomp_prefill", self._handle.pointer, array.ctypes.data, array.size, logits.ctypes.data)
        return logits

    def generate(
        self,
        ids: IdsLike,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> Iterator[Token]:
        """Appends the prompt ``ids`` and yields generated tokens; see ``Executable.generate``.

        The arguments are checked at once; each step of the iterator runs one step of the model. Raises
        HetcompError.
        """
        _check_range("seed", seed, 0, 2**64 - 1)
        _check_range("top_k", top_k, 0, 2**31 - 1)
        _check_range("max_new_tokens", max_new_tokens, 0, 2**63 - 1)
        if any("\0" in text for text in stop):
            _refuse("A stop string contains a NUL character.")
        array = _ids(ids)
        texts = [text.encode() for text in stop]
        params = _GenerateParams(
            struct_size=ctypes.sizeof(_GenerateParams),
            ignore_eos=int(ignore_eos),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            n_stop=len(texts),
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=(ctypes.c_char_p * len(texts))(*texts),
        )
        out = ctypes.c_void_p()
        _call(
            "hetcomp_generation_start",
            self._handle.pointer,
            array.ctypes.data,
            array.size,
            ctypes.byref(params),
            ctypes.byref(out),
        )
        return self._tokens(_Handle(out.value, "hetcomp_generation_free"))

    def _tokens(self, generation: _Handle) -> Iterator[Token]:
        token = _Token()
        try:
            while True:
                # A closed session would leave the generation without its memory.
                _ = self._handle.pointer
                _call("hetcomp_generation_next", generation.pointer, ctypes.byref(token))
                finish = Finish(token.finish)
                if token.id != _NOTHING_GENERATED:
                    text = ctypes.string_at(token.text, token.text_length).decode()
                    yield Token(token.id, text, finish)
                if finish is not Finish.NONE:
                    return
        finally:
            generation.close()


class Runtime:
    """A loaded artifact. Made by :meth:`load`; may be used from several threads."""

    def __init__(self, handle: _Handle) -> None:
        self._handle = handle
        self.info = _model_info(handle)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        threads: int = 0,
        weights: str = "auto",
        verify_weights: bool = True,
        isa: str | None = None,
    ) -> Runtime:
        """Loads an artifact.

        threads: 0 for the physical cores this process may use. weights: ``ram`` (2 MB pages), ``mmap``, or
        ``auto`` (ram if it fits into 80 % of the available memory). verify_weights: compare every tensor with
        its hash. isa: force ``avx2`` or ``avx512``. Raises HetcompError: no artifact, damaged, newer schema,
        missing instruction set, not enough memory.
        """
        if weights not in _WEIGHTS:
            _refuse(f"weights must be auto, mmap or ram, not {weights!r}.")
        _check_range("threads", threads, 0, 2**31 - 1)
        options = _LoadOptions(
            struct_size=ctypes.sizeof(_LoadOptions),
            threads=threads,
            weights=_WEIGHTS[weights],
            verify_weights=int(verify_weights),
            isa=None if isa is None else isa.encode(),
        )
        out = ctypes.c_void_p()
        _call("hetcomp_load", str(path).encode(), ctypes.byref(options), ctypes.byref(out))
        return cls(_Handle(out.value, "hetcomp_model_free"))

    def close(self) -> None:
        """Frees the model when its last session is closed."""
        self._handle.close()

    def session(self) -> Session:
        """A new, empty sequence. Raises HetcompError if all ``max_batch`` are in use."""
        return Session(self)

    def forward(self, ids: IdsLike) -> NDArray[np.float32]:
        """Logits of a sequence of T token ids, float32 [T, vocab]. Raises HetcompError."""
        with self.session() as session:
            return session.forward(ids)

    def decode(self, sessions: Sequence[Session], ids: IdsLike) -> NDArray[np.float32]:
        """One token for each of n different sessions in one step: float32 [n, vocab]. Raises HetcompError."""
        array = _ids(ids)
        if array.size != len(sessions):
            _refuse(f"{len(sessions)} sessions need as many token ids, not {array.size}.")
        pointers = (ctypes.c_void_p * len(sessions))(*(session._handle.pointer for session in sessions))
        logits = np.empty((array.size, self.info.vocab), np.float32)
        _call(
            "hetcomp_decode",
            self._handle.pointer,
            pointers,
            array.ctypes.data,
            array.size,
            logits.ctypes.data,
        )
        return logits

    def generate(self, ids: IdsLike, **params: Any) -> Iterator[Token]:  # noqa: ANN401 - Session.generate's
        """Generates in a new session, which is closed at the end; parameters of :meth:`Session.generate`."""
        session = self.session()
        try:
            tokens = session.generate(ids, **params)
        except BaseException:
            session.close()
            raise
        return _closing(session, tokens)

    def stats(self) -> dict[str, Any]:
        """Measured since loading: see ``hetcomp_model_stats`` in hetcomp.h."""
        out = ctypes.c_void_p()
        _call("hetcomp_model_stats", self._handle.pointer, ctypes.byref(out))
        figures: dict[str, Any] = json.loads(_owned_bytes(out, -1))
        return figures

    def reset_stats(self) -> None:
        """Sets the prefill and decode figures to zero."""
        _call("hetcomp_model_reset_stats", self._handle.pointer)

    def tokenize(self, text: str, *, parse_special: bool = True, add_special: bool = True) -> list[int]:
        """Token ids of ``text``. parse_special: special tokens in the text count as such. add_special:
        add what the model puts around a text (BOS). Raises HetcompError for a model without tokenizer."""
        data = _utf8(text)
        out, n = ctypes.c_void_p(), ctypes.c_size_t()
        _call(
            "hetcomp_tokenize",
            self._handle.pointer,
            data,
            len(data),
            int(parse_special),
            int(add_special),
            ctypes.byref(out),
            ctypes.byref(n),
        )
        ids: list[int] = np.frombuffer(_owned_bytes(out, 4 * n.value), np.int32).tolist()
        return ids

    def detokenize(self, ids: IdsLike, *, skip_special: bool = True) -> str:
        """The text of ``ids``. Raises HetcompError for a model without tokenizer."""
        array = _ids(ids)
        out, length = ctypes.c_void_p(), ctypes.c_size_t()
        _call(
            "hetcomp_detokenize",
            self._handle.pointer,
            array.ctypes.data,
            array.size,
            int(skip_special),
            ctypes.byref(out),
            ctypes.byref(length),
        )
        return _owned_bytes(out, length.value).decode()

    def chat_render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,  # noqa: ANN401 - whatever the template knows
    ) -> str:
        """The prompt text of a conversation. Raises HetcompError for a model without chat template or if the
        template refuses the conversation."""
        context = {"messages": list(messages), "add_generation_prompt": add_generation_prompt, **variables}
        data = _utf8(json.dumps(context, ensure_ascii=False))
        out, length = ctypes.c_void_p(), ctypes.c_size_t()
        _call(
            "hetcomp_chat_render",
            self._handle.pointer,
            data,
            len(data),
            ctypes.byref(out),
            ctypes.byref(length),
        )
        return _owned_bytes(out, length.value).decode()


def _closing(session: Session, tokens: Iterator[Token]) -> Iterator[Token]:
    with session:
        yield from tokens


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise RuntimeRefusal(
            Status.INVALID_ARGUMENT,
            f"The text has a lone surrogate at position {error.start} and is not valid Unicode.",
        ) from error


def _model_info(handle: _Handle) -> ModelInfo:
    raw = _ModelInfo(struct_size=ctypes.sizeof(_ModelInfo))
    _call("hetcomp_model_get_info", handle.pointer, ctypes.byref(raw))
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
    )
