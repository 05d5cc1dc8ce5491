"""Proof that a compiled chat template gives the same text as transformers' ``apply_chat_template``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hetcomp.artifact.chat_template import Json, special_tokens, template_bytes, template_sources
from hetcomp.artifact.text_library import NativeChatTemplate
from hetcomp.errors import HetcompError

_USER = {"role": "user", "content": "What is 2+2?"}
_ASSISTANT = {"role": "assistant", "content": "It is 4."}
_TOOL_CALL: Json = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "call00001",
            "type": "function",
            "function": {
                "name": "get_weather",
                "arguments": {"city": "Zürich", "days": 2, "metric": True, "at": None},
            },
        }
    ],
}
_TOOL_RESULT = {
    "role": "tool",
    "name": "get_weather",
    "tool_call_id": "call00001",
    "content": '{"temperature": 21.5}',
}
_TOOLS: list[Json] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'Weather of a "city" <now> & later',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Name of the city, e.g. 東京"},
                    "days": {"type": "integer", "default": 1},
                    "unit": {"type": "string", "enum": ["C", "F"]},
                    "tags": {"type": "array", "items": {"type": "string"}},
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "now",
            "description": "Time",
            "parameters": {"type": "object", "properties": {}},
        },
    },
]
_CONVERSATIONS: tuple[list[Json], ...] = (
    [_USER],
    [{"role": "system", "content": "Be brief."}, _USER],
    [_USER, _ASSISTANT],
    [_USER, _ASSISTANT, {"role": "user", "content": "And 3+3?"}],
    [
        {"role": "system", "content": "Sei höflich.\n"},
        _USER,
        _ASSISTANT,
        {"role": "user", "content": " \n und nun? \t"},
    ],
    [{"role": "user", "content": ""}],
    [
        {"role": "system", "content": ""},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": ""},
    ],
    [
        {
            "role": "user",
            "content": "Grüße 漢字 👩‍👩‍👧 e\u0301 \u00a0\u2028\u0085 <|im_end|> </s> <b>&\"'\\ {{x}} {% y %}",
        }
    ],
    [
        {"role": "user", "content": "line\r\nline\n\n\n  indented"},
        {"role": "assistant", "content": "\n\n ok \n"},
    ],
    [
        _USER,
        {"role": "assistant", "content": "<think>\nadd them\n</think>\n\nIt is 4."},
        {"role": "user", "content": "Sure?"},
    ],
    [_USER, {"role": "assistant", "content": "It is 4.", "reasoning_content": "add\nthem "}, _USER],
    [_USER, {"role": "assistant", "content": "It is 4.", "reasoning_content": "last"}],
    [{"role": "developer", "content": "You are a tester."}, _USER],
    [_ASSISTANT],
    [{"role": "system", "content": "Only a system message."}],
    [_USER, _USER],
    [
        {
            "role": "user",
            "content": [{"type": "text", "text": "part one"}, {"type": "text", "text": "part two"}],
        }
    ],
    [_USER, _TOOL_CALL, _TOOL_RESULT],
    [_USER, _TOOL_CALL, _TOOL_RESULT, _ASSISTANT, {"role": "user", "content": "Thanks"}],
    [_USER, _TOOL_CALL, _TOOL_RESULT, {**_TOOL_RESULT, "content": "second"}],
    [_USER, {"role": "assistant", "content": None, "tool_calls": _TOOL_CALL["tool_calls"] * 2}, _TOOL_RESULT],
    [{"role": "narrator", "content": "an unknown role"}, _USER],
    [{"role": "user"}],
)


def prove_chat_template_parity(compiled: Json, folder: Path, library: Path | None = None) -> int:
    """Renders a set of conversations with transformers and with the C++ runtime, in all modes of the template.

    Returns the number of renderings compared; where transformers raises, the runtime must refuse too. Raises
    HetcompError with the first conversation on which the two differ, if transformers renders none of them, or
    if the runtime library is missing.
    """
    sources = template_sources(folder)
    reference = _Reference(sources, special_tokens(folder))
    compared = rendered = 0
    with NativeChatTemplate(template_bytes(compiled), library) as native:
        for messages, options in _cases(" ".join(sources.values())):
            context = {"messages": messages, **options}
            expected = reference.render(messages, options)
            try:
                got: str | None = native.render(context)
                refusal = ""
            except HetcompError as error:
                got, refusal = None, f" ({error})"
            if got != expected:
                raise HetcompError(
                    f"The compiled chat template of {folder} does not render {context!r} as transformers does "
                    f"(expected {expected!r}, got {got!r}{refusal}); compile without a chat template and "
                    "report this."
                )
            compared += 1
            rendered += expected is not None
    if rendered == 0:
        raise HetcompError(
            f"The chat template of {folder} renders none of hetcomp's test conversations, so it cannot be "
            "checked; compile without a chat template."
        )
    return compared


class _Reference:
    def __init__(self, sources: dict[str, str], tokens: dict[str, str]) -> None:
        from tokenizers import Tokenizer, models

        try:
            from transformers import PreTrainedTokenizerFast
        except ModuleNotFoundError:
            raise HetcompError(
                "The chat template is compared with what transformers renders, which is not installed."
            ) from None

        template: Any = sources["default"] if len(sources) == 1 else sources
        # The vocabulary plays no part in rendering.
        self._tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **tokens)
        self._tokenizer.chat_template = template

    def render(self, messages: list[Json], options: Json) -> str | None:
        """The text, or None if the template refuses the conversation."""
        try:
            text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception:  # templates raise jinja2 and plain Python exceptions alike
            return None
        return text


def _cases(source: str) -> Iterator[tuple[list[Json], Json]]:
    switches: list[list[Json]] = [[{"add_generation_prompt": False}, {"add_generation_prompt": True}]]
    for name in ("enable_thinking", "thinking"):
        if name in source:
            switches.append([{}, {name: True}, {name: False}])
    if "reasoning_effort" in source:
        switches.append([{}, {"reasoning_effort": "high"}])
    if "tools" in source:
        switches.append([{}, {"tools": _TOOLS}, {"tools": []}])
    if "documents" in source:
        switches.append([{}, {"documents": [{"title": "T", "text": "Some text."}]}])
    for messages in _CONVERSATIONS:
        for choice in itertools.product(*switches):
            yield messages, {key: value for option in choice for key, value in option.items()}
