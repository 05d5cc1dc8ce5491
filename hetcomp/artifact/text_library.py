"""The tokenizer and chat template of libhetcomp_runtime.so, called through their C functions."""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Any

from hetcomp import installed_runtime
from hetcomp.errors import HetcompError


def runtime_library() -> Path:
    """The runtime library of this installation, or ``$HETCOMP_RUNTIME_LIBRARY``.

    Raises HetcompError if it is absent.
    """
    override = os.environ.get("HETCOMP_RUNTIME_LIBRARY")
    if not override:
        return installed_runtime.library()
    if not Path(override).is_file():
        raise HetcompError(f"HETCOMP_RUNTIME_LIBRARY={override} is not a file; unset it or correct it.")
    return Path(override)


class _Library:
    def __init__(self, path: Path) -> None:
        try:
            self.c = ctypes.CDLL(str(path))
            handle, text = ctypes.c_void_p, ctypes.POINTER(ctypes.c_char)
            size, size_out, text_out = ctypes.c_size_t, ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(text)
            ids, flag = ctypes.POINTER(ctypes.c_int32), ctypes.c_int
            load = (flag, [ctypes.c_char_p, size, ctypes.POINTER(handle), text_out])
            decode = (flag, [handle, ids, size, flag, text_out, size_out, text_out])
            signatures: dict[str, tuple[Any, list[Any]]] = {
                "hetcomp_tokenizer_load": load,
                "hetcomp_tokenizer_free": (None, [handle]),
                "hetcomp_tokenizer_encode": (
                    flag, [handle, ctypes.c_char_p, size, flag, flag, ctypes.POINTER(ids), size_out, text_out]),
                "hetcomp_tokenizer_decode": decode,
                "hetcomp_tokenizer_decode_stream": decode,
                "hetcomp_chat_template_load": load,
                "hetcomp_chat_template_free": (None, [handle]),
                "hetcomp_chat_template_render": (
                    flag, [handle, ctypes.c_char_p, size, text_out, size_out, text_out]),
                "hetcomp_ids_free": (None, [ids]),
                "hetcomp_text_free": (None, [text]),
            }  # fmt: skip
            for name, (result, arguments) in signatures.items():
                function = getattr(self.c, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise HetcompError(f"{path} is not a hetcomp runtime library: {error}; build it again.") from error
        self._text_type = text

    def call(self, name: str, *arguments: Any) -> None:  # noqa: ANN401  (ctypes values)
        error = self._text_type()
        if getattr(self.c, name)(*arguments, ctypes.byref(error)) != 0:
            raise HetcompError(self.take(error).decode("utf-8", "replace"))

    def take(self, text: Any, length: int | None = None) -> bytes:  # noqa: ANN401
        """The bytes of a C text, which is then freed."""
        value = ctypes.string_at(text) if length is None else ctypes.string_at(text, length)
        self.c.hetcomp_text_free(text)
        return value

    def text(self, name: str, *arguments: Any) -> str:  # noqa: ANN401
        text, length = self._text_type(), ctypes.c_size_t()
        self.call(name, *arguments, ctypes.byref(text), ctypes.byref(length))
        return self.take(text, length.value).decode("utf-8")


class NativeTokenizer:
    """A compiled tokenizer run by the C++ runtime. Errors of the C++ side are raised as HetcompError."""

    def __init__(self, compiled: bytes, library: Path | None = None) -> None:
        self._library = _Library(library or runtime_library())
        self._handle = ctypes.c_void_p()
        self._library.call("hetcomp_tokenizer_load", compiled, len(compiled), ctypes.byref(self._handle))

    def encode(self, text: str | bytes, *, parse_special: bool = True, add_special: bool = False) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        ids, count = ctypes.POINTER(ctypes.c_int32)(), ctypes.c_size_t()
        self._library.call(
            "hetcomp_tokenizer_encode", self._handle, data, len(data), int(parse_special), int(add_special),
            ctypes.byref(ids), ctypes.byref(count),
        )  # fmt: skip
        values = ids[: count.value]
        self._library.c.hetcomp_ids_free(ids)
        return values

    def decode(self, ids: list[int], *, skip_special: bool = True, stream: bool = False) -> str:
        name = "hetcomp_tokenizer_decode_stream" if stream else "hetcomp_tokenizer_decode"
        array = (ctypes.c_int32 * len(ids))(*ids)
        return self._library.text(name, self._handle, array, len(ids), int(skip_special))

    def close(self) -> None:
        if self._handle:
            self._library.c.hetcomp_tokenizer_free(self._handle)
            self._handle = ctypes.c_void_p()

    def __enter__(self) -> NativeTokenizer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class NativeChatTemplate:
    """A compiled chat template run by the C++ runtime. Errors of the C++ side are raised as HetcompError."""

    def __init__(self, compiled: bytes, library: Path | None = None) -> None:
        self._library = _Library(library or runtime_library())
        self._handle = ctypes.c_void_p()
        self._library.call("hetcomp_chat_template_load", compiled, len(compiled), ctypes.byref(self._handle))

    def render(self, context: dict[str, Any]) -> str:
        """``context``: the template's variables: messages, add_generation_prompt, tools, ..."""
        data = json.dumps(context, ensure_ascii=False).encode()
        return self._library.text("hetcomp_chat_template_render", self._handle, data, len(data))

    def close(self) -> None:
        if self._handle:
            self._library.c.hetcomp_chat_template_free(self._handle)
            self._handle = ctypes.c_void_p()

    def __enter__(self) -> NativeChatTemplate:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
