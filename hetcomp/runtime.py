"""The runtime library from Python: ctypes over the C ABI of ``hetcomp/hetcomp.h``.

Only numpy is needed. All work happens in the library; a step releases the interpreter lock, and between two
steps Python code runs, so that Ctrl-C and a closed iterator end a generation at once.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetcomp.model_info import model_info
from hetcomp.runtime_abi import (
    GenerateParamsStruct,
    Handle,
    LoadOptionsStruct,
    RuntimeRefusal,
    Status,
    TokenStruct,
    call,
    library,
    owned_bytes,
    refuse,
)

_WEIGHTS = {"auto": 0, "mmap": 1, "ram": 2}
_DEFERRAL = {"generated": 0, "all": 1, "none": 2}
_NOTHING_GENERATED = -1

IdsLike = Sequence[int] | NDArray[np.integer[Any]]


class Finish(IntEnum):
    """hetcomp_finish: why a token is the last one."""

    NONE = 0
    EOS = 1
    LENGTH = 2
    STOP = 3
    CONTEXT = 4
    CALLBACK = 5


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token. ``text`` is what became complete with it (maybe nothing; all texts together are the
    whole text), ``finish`` is not NONE for the last one."""

    id: int
    text: str
    finish: Finish = Finish.NONE


def version() -> str:
    """Version of the runtime library."""
    text: bytes = library().hetcomp_version()
    return text.decode()


def _check_range(name: str, value: int, low: int, high: int) -> None:
    """ctypes would cut a number that does not fit."""
    if not low <= value <= high:
        refuse(f"{name} must be from {low} to {high}, not {value}.")


def _ids(ids: IdsLike) -> NDArray[np.int32]:
    """One row of token ids as int32, contiguous."""
    array = np.asarray(ids)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        refuse(f"Token ids must be a flat list of whole numbers, not {array.dtype} of shape {array.shape}.")
    if array.size and (int(array.min()) < -(2**31) or int(array.max()) >= 2**31):
        refuse(f"Token id {int(array.max())} is outside of every vocabulary.")
    return np.ascontiguousarray(array, dtype=np.int32)


class Session:
    """One sequence with its place in the KV cache. Use from one thread at a time; close it when done."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        out = ctypes.c_void_p()
        call("hetcomp_session_create", runtime._handle.pointer, ctypes.byref(out))
        self._handle = Handle(out.value, "hetcomp_session_free")

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the sequence's place. Closing twice does nothing."""
        self._handle.close()

    def __len__(self) -> int:
        length = ctypes.c_int64()
        call("hetcomp_session_length", self._handle.pointer, ctypes.byref(length))
        return length.value

    def expert_statistics(self) -> str:
        """How often this session's tokens chose each expert, since it was created or :meth:`Runtime.count_experts` was
        called; see :meth:`Runtime.expert_statistics`."""
        return _expert_statistics("hetcomp_session_expert_statistics", self._handle)

    def set_adapter(self, name: str | None) -> None:
        """The adapter of all that follows; None: the model as it was compiled. If it is another than before, all tokens
        are forgotten. Raises HetcompError if there is none of that name."""
        call("hetcomp_session_set_adapter", self._handle.pointer, None if name is None else _name(name))

    def reset(self) -> None:
        """Forgets all tokens."""
        self.truncate(0)

    def truncate(self, length: int) -> None:
        """Keeps the first ``length`` tokens; where the model has recurrences (linear attention) they are computed again
        before the next ones. Raises HetcompError if there are fewer."""
        _check_range("length", length, 0, 2**63 - 1)
        call("hetcomp_session_truncate", self._handle.pointer, length)

    def reuse(self, ids: IdsLike) -> int:
        """Truncates to the longest common prefix with ``ids`` (at most all but one); returns its length. Where the
        model has recurrences: to the last step of a prompt that begins in it, unless all tokens are in that prefix."""
        array = _ids(ids)
        kept = ctypes.c_int64()
        call("hetcomp_session_reuse", self._handle.pointer, array.ctypes.data, array.size, ctypes.byref(kept))
        return kept.value

    def forward(self, ids: IdsLike) -> NDArray[np.float32]:
        """Appends ``ids`` (T) and returns the logits of each, float32 [T, vocab]. Raises HetcompError."""
        array = _ids(ids)
        logits = np.empty((array.size, self.runtime.info.vocab), np.float32)
        call("hetcomp_forward", self._handle.pointer, array.ctypes.data, array.size, logits.ctypes.data)
        return logits

    def prefill(self, ids: IdsLike) -> NDArray[np.float32]:
        """Appends ``ids`` and returns the logits of the last, float32 [vocab]. Raises HetcompError."""
        array = _ids(ids)
        logits = np.empty(self.runtime.info.vocab, np.float32)
        call("hetcomp_prefill", self._handle.pointer, array.ctypes.data, array.size, logits.ctypes.data)
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
            refuse("A stop string contains a NUL character.")
        array = _ids(ids)
        texts = [text.encode() for text in stop]
        params = GenerateParamsStruct(
            struct_size=ctypes.sizeof(GenerateParamsStruct),
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
        call(
            "hetcomp_generation_start",
            self._handle.pointer,
            array.ctypes.data,
            array.size,
            ctypes.byref(params),
            ctypes.byref(out),
        )
        return self._tokens(Handle(out.value, "hetcomp_generation_free"))

    def _tokens(self, generation: Handle) -> Iterator[Token]:
        token = TokenStruct()
        try:
            while True:
                # A closed session would leave the generation without its memory.
                _ = self._handle.pointer
                call("hetcomp_generation_next", generation.pointer, ctypes.byref(token))
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

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self.info = model_info(handle)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        threads: int = 0,
        weights: str = "auto",
        verify_weights: bool = True,
        isa: str | None = None,
        gpus: Sequence[int] = (),
    ) -> Runtime:
        """Loads an artifact.

        threads: 0 for the physical cores this process may use. weights: ``ram`` (2 MB pages), ``mmap``, or
        ``auto`` (ram if it fits into 80 % of the available memory). verify_weights: compare every tensor with
        its hash. isa: force one of the artifact's instruction sets. gpus: for an artifact compiled for GPUs, a
        number for each of them as the driver counts; by default its ``gpu:0`` is number 0. Raises HetcompError: no
        artifact, damaged, newer schema, missing instruction set, no GPU that runs it, not enough memory.
        """
        if weights not in _WEIGHTS:
            refuse(f"weights must be auto, mmap or ram, not {weights!r}.")
        _check_range("threads", threads, 0, 2**31 - 1)
        for gpu in gpus:
            _check_range("gpus", gpu, 0, 2**31 - 1)
        options = LoadOptionsStruct(
            struct_size=ctypes.sizeof(LoadOptionsStruct),
            threads=threads,
            weights=_WEIGHTS[weights],
            verify_weights=int(verify_weights),
            isa=None if isa is None else isa.encode(),
            n_gpus=len(gpus),
            gpus=(ctypes.c_int32 * len(gpus))(*gpus),
        )
        out = ctypes.c_void_p()
        call("hetcomp_load", str(path).encode(), ctypes.byref(options), ctypes.byref(out))
        return cls(Handle(out.value, "hetcomp_model_free"))

    def close(self) -> None:
        """Frees the model when its last session is closed."""
        self._handle.close()

    def session(self, adapter: str | None = None) -> Session:
        """A new, empty sequence, maybe with an adapter. Raises HetcompError if all ``max_batch`` are in use."""
        session = Session(self)
        try:
            session.set_adapter(adapter)
        except BaseException:
            session.close()
            raise
        return session

    def load_adapter(self, path: str | Path, name: str) -> None:
        """Makes an adapter available: a file that ``hetcomp adapter pack`` wrote for this artifact. Raises HetcompError
        if it is refused; running requests are not concerned."""
        call("hetcomp_adapter_load", self._handle.pointer, str(path).encode(), _name(name))

    def unload_adapter(self, name: str) -> None:
        """Forgets an adapter. Raises HetcompError while a session has it."""
        call("hetcomp_adapter_unload", self._handle.pointer, _name(name))

    def adapters(self) -> list[dict[str, Any]]:
        """The adapters that can be chosen; see ``hetcomp_adapter_list`` in hetcomp.h."""
        out = ctypes.c_void_p()
        call("hetcomp_adapter_list", self._handle.pointer, ctypes.byref(out))
        found: list[dict[str, Any]] = json.loads(owned_bytes(out, -1))
        return found

    def forward(self, ids: IdsLike, *, adapter: str | None = None) -> NDArray[np.float32]:
        """Logits of a sequence of T token ids, float32 [T, vocab]. Raises HetcompError."""
        with self.session(adapter) as session:
            return session.forward(ids)

    def decode(self, sessions: Sequence[Session], ids: IdsLike) -> NDArray[np.float32]:
        """One token for each of n different sessions in one step: float32 [n, vocab]. Raises HetcompError."""
        array = _ids(ids)
        if array.size != len(sessions):
            refuse(f"{len(sessions)} sessions need as many token ids, not {array.size}.")
        pointers = (ctypes.c_void_p * len(sessions))(*(session._handle.pointer for session in sessions))
        logits = np.empty((array.size, self.info.vocab), np.float32)
        call(
            "hetcomp_decode",
            self._handle.pointer,
            pointers,
            array.ctypes.data,
            array.size,
            logits.ctypes.data,
        )
        return logits

    def generate(self, ids: IdsLike, *, adapter: str | None = None, **params: Any) -> Iterator[Token]:  # noqa: ANN401 - Session.generate's
        """Generates in a new session, which is closed at the end; parameters of :meth:`Session.generate`."""
        session = self.session(adapter)
        try:
            tokens = session.generate(ids, **params)
        except BaseException:
            session.close()
            raise
        return _closing(session, tokens)

    def stats(self) -> dict[str, Any]:
        """Measured since loading: see ``hetcomp_model_stats`` in hetcomp.h.

        ``prefill`` and ``decode`` have ``seconds`` of their steps and ``timers_ms`` by role. Timers are those of
        thread 0 of the first lane: what it computed or waited for. They cover the program of a step, not what is
        around it (the call, sampling, text), so that their sum is a little below ``seconds``; with several lanes
        they do not show what only the others do.
        """
        out = ctypes.c_void_p()
        call("hetcomp_model_stats", self._handle.pointer, ctypes.byref(out))
        figures: dict[str, Any] = json.loads(owned_bytes(out, -1))
        return figures

    def count_experts(self, half_life: int | None = 0) -> None:
        """Counts from the next step on how often each expert is chosen, by all tokens and by those of each session. A
        choice counts half of a new one once ``half_life`` more tokens were counted (0: as much as a new one, always);
        None: nothing is counted any more. Layers whose experts are all on a GPU are left out."""
        if half_life is not None:
            _check_range("half_life", half_life, 0, 2**62)
        call("hetcomp_model_count_experts", self._handle.pointer, -1 if half_life is None else half_life)

    def expert_statistics(self) -> str:
        """What was counted, or since the figures were set to zero: the text of a file that ``hetcomp plan --stats``
        reads. Raises RuntimeRefusal if nothing was."""
        return _expert_statistics("hetcomp_model_expert_statistics", self._handle)

    def reset_stats(self) -> None:
        """Sets the prefill and decode figures to zero."""
        call("hetcomp_model_reset_stats", self._handle.pointer)

    def set_deferral(self, which: str) -> None:
        """Of which tokens the model defers experts from the next step on, if its plan defers any: ``generated`` (decode
        steps; so it is when loaded), ``all`` (prompts too: to measure on text what it costs), or ``none``."""
        if which not in _DEFERRAL:
            refuse(f"Deferral is of generated tokens, of all, or of none, not {which!r}.")
        call("hetcomp_model_set_deferral", self._handle.pointer, _DEFERRAL[which])

    def set_routing_callback(self, callback: Any) -> None:  # noqa: ANN401 - a function type of ctypes
        """Tells ``callback`` (a ``RoutingCallback``) of the routing of every step from the next one on; a null one:
        nobody any more. It must live, and must not use the model."""
        call("hetcomp_model_set_routing_callback", self._handle.pointer, callback, None)

    def set_lane_trace_callback(self, callback: Any) -> None:  # noqa: ANN401 - a function type of ctypes
        """The same of what the lanes do in every step (a ``LaneTraceCallback``)."""
        call("hetcomp_model_set_lane_trace_callback", self._handle.pointer, callback, None)

    def replay_routing(self, experts: NDArray[np.int32] | None, weights: NDArray[np.float32] | None) -> None:
        """From the next step on the experts get this routing, [layers, N, top_k], a token that of row position modulo
        N; None: the routers' again. A step fails (RuntimeRefusal) where it is of another shape than the model's, or
        the model's routers run on a GPU."""
        if experts is None or weights is None:
            call("hetcomp_model_replay_routing", self._handle.pointer, 0, 0, 0, None, None)
            return
        if experts.shape != weights.shape or experts.ndim != 3:
            refuse(f"A routing has experts and weights of one shape with 3 dimensions, not {experts.shape}.")
        ids, parts = np.ascontiguousarray(experts, np.int32), np.ascontiguousarray(weights, np.float32)
        layers, tokens, top_k = ids.shape
        pointers = (ids.ctypes.data, parts.ctypes.data)
        call("hetcomp_model_replay_routing", self._handle.pointer, layers, tokens, top_k, *pointers)

    def tokenize(self, text: str, *, parse_special: bool = True, add_special: bool = True) -> list[int]:
        """Token ids of ``text``. parse_special: special tokens in the text count as such. add_special:
        add what the model puts around a text (BOS). Raises HetcompError for a model without tokenizer."""
        data = _utf8(text)
        out, n = ctypes.c_void_p(), ctypes.c_size_t()
        call(
            "hetcomp_tokenize",
            self._handle.pointer,
            data,
            len(data),
            int(parse_special),
            int(add_special),
            ctypes.byref(out),
            ctypes.byref(n),
        )
        ids: list[int] = np.frombuffer(owned_bytes(out, 4 * n.value), np.int32).tolist()
        return ids

    def detokenize(self, ids: IdsLike, *, skip_special: bool = True) -> str:
        """The text of ``ids``. Raises HetcompError for a model without tokenizer."""
        array = _ids(ids)
        out, length = ctypes.c_void_p(), ctypes.c_size_t()
        call(
            "hetcomp_detokenize",
            self._handle.pointer,
            array.ctypes.data,
            array.size,
            int(skip_special),
            ctypes.byref(out),
            ctypes.byref(length),
        )
        return owned_bytes(out, length.value).decode()

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
        call(
            "hetcomp_chat_render",
            self._handle.pointer,
            data,
            len(data),
            ctypes.byref(out),
            ctypes.byref(length),
        )
        return owned_bytes(out, length.value).decode()


def _expert_statistics(function: str, handle: Handle) -> str:
    out = ctypes.c_void_p()
    call(function, handle.pointer, ctypes.byref(out))
    return owned_bytes(out, -1).decode()


def _closing(session: Session, tokens: Iterator[Token]) -> Iterator[Token]:
    with session:
        yield from tokens


def _name(text: str) -> bytes:
    """A string of C. Raises RuntimeRefusal if it cannot be one."""
    if "\0" in text:
        refuse("A name contains a NUL character.")
    return _utf8(text)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise RuntimeRefusal(
            Status.INVALID_ARGUMENT,
            f"The text has a lone surrogate at position {error.start} and is not valid Unicode.",
        ) from error
