"""The C++ evaluator renders chat templates as transformers does, by family and construct by construct."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from hetcomp.artifact.chat_template import compile_chat_template, template_bytes
from hetcomp.artifact.chat_template_parity import prove_chat_template_parity
from hetcomp.artifact.text_library import NativeChatTemplate
from hetcomp.errors import HetcompError

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parent / "chat_templates"
TEMPLATES = sorted(DATA.glob("*.jinja"))
TOKENS = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}


def folder_with(tmp_path: Path, template: object, as_file: bool = False) -> Path:
    config: dict[str, object] = dict(TOKENS)
    if as_file:
        (tmp_path / "chat_template.jinja").write_text(str(template), encoding="utf-8")
    else:
        config["chat_template"] = template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_family_has_parity(path: Path, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, path.read_text(encoding="utf-8"), as_file=path.stem.startswith("g"))
    compiled = compile_chat_template(folder)
    assert compiled is not None
    assert prove_chat_template_parity(compiled, folder) >= 46


def test_demo_model_has_parity() -> None:
    folder = ROOT / "models_zoo" / "demo-moe"
    compiled = compile_chat_template(folder)
    assert compiled is not None
    assert prove_chat_template_parity(compiled, folder) >= 46


def test_named_templates_follow_the_tools(tmp_path: Path) -> None:
    folder = folder_with(
        tmp_path,
        [
            {"name": "default", "template": "{{ bos_token }}plain {{ messages[0].content }}"},
            {"name": "tool_use", "template": "with {{ tools | length }} tools{{ eos_token }}"},
            {"name": "rag", "template": "{% include 'never compiled' %}"},
        ],
    )
    compiled = compile_chat_template(folder)
    assert compiled is not None
    # the conversations of the proof carry no tools unless the sources name them, which tool_use does
    assert prove_chat_template_parity(compiled, folder) >= 46


def test_parity_proof_notices_a_difference(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, TEMPLATES[0].read_text(encoding="utf-8"))
    compiled = compile_chat_template(folder)
    assert compiled is not None
    other = folder_with(tmp_path, TEMPLATES[0].read_text(encoding="utf-8").replace("helpful", "useful"))
    with pytest.raises(HetcompError, match="as transformers does"):
        prove_chat_template_parity(compiled, other)


CONTEXT: dict[str, Any] = {
    "s": "  Hello, wörld! 漢字 it's\tok\n",
    "word": "abcabc",
    "empty": "",
    "n": 7,
    "neg": -3,
    "f": 2.5,
    "big": 1e22,
    "small": 1.5e-7,
    "yes": True,
    "no": False,
    "nothing": None,
    "xs": [3, 1, 2, 1],
    "mixed": ["b", "A", "a", "C"],
    "rows": [{"k": "x", "v": {"w": 1}}, {"k": "y", "v": {"w": 2}}, {"k": "x"}],
    "d": {"b": 1, "a": [1, "two", None, True, 2.0], "items": "shadow", "ü": {"n": {}}, "e": []},
    "quotes": "a'b\"c\\d\x01\x7f\u00a0\u200b\U0001f600",
    "lines": "one\r\ntwo\n\nthree\x0bfour\u2028five",
}
EXPRESSIONS = (DATA / "expressions.txt").read_text(encoding="utf-8").splitlines()
STATEMENTS = (DATA / "statements.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n====\n")


def reference(source: str, context: dict[str, Any]) -> str | None:
    try:
        text: str = _compile_jinja_template(source).render(**context)
    except Exception:
        return None
    return text


def ours(source: str, context: dict[str, Any], tmp_path: Path) -> str | None:
    """The C++ text; None if it refuses, now or when compiling."""
    try:
        compiled = compile_chat_template(folder_with(tmp_path, source))
        assert compiled is not None
        with NativeChatTemplate(template_bytes(compiled)) as native:
            return native.render(context)
    except HetcompError:
        return None


def test_expressions_are_those_of_jinja(tmp_path: Path) -> None:
    context = {
        "messages": [{"role": "user", "content": "x"}],
        "tools": None,
        "add_generation_prompt": False,
        **CONTEXT,
    }
    wrong = []
    for expression in EXPRESSIONS:
        source = "[{{ " + expression + " }}]"
        expected, got = reference(source, context), ours(source, context, tmp_path)
        if expected != got:
            wrong.append((expression, expected, got))
    assert not wrong
    assert len(EXPRESSIONS) > 300


@pytest.mark.parametrize("source", STATEMENTS)
def test_statements_are_those_of_jinja(source: str, tmp_path: Path) -> None:
    context = {
        "messages": [{"role": "user", "content": "x"}],
        "tools": None,
        "add_generation_prompt": False,
        **CONTEXT,
    }
    assert ours(source, context, tmp_path) == reference(source, context)


@pytest.mark.parametrize(
    ("source", "construct"),
    [
        ("{% include 'x' %}", "Include"),
        ("{% extends 'x' %}", "Extends"),
        ("{% block b %}{% endblock %}", "Block"),
        ("{% import 'x' as y %}", "Import"),
        ("{% filter upper %}x{% endfilter %}", "FilterBlock"),
        ("{% with a = 1 %}{% endwith %}", "With"),
        ("{% for x in y recursive %}{{ loop(x) }}{% endfor %}", "recursive for"),
        ("{{ x | pprint }}", "filter 'pprint'"),
        ("{{ x | map('escape') | list }}", "'escape'"),
        ("{{ x is filter }}", "test 'filter'"),
        ("{{ x.format(1) }}", r"method \.format\(\)"),
        ("{{ '%s' % x }}", "formatting"),
        ("{{ f(*x) }}", r"\* or \*\*"),
        ("{{ x.__class__ }}", "private attribute"),
        ("{{ cycler(1, 2) }}", "global 'cycler'"),
        ("{{ (x | safe) + y }}", "'safe'"),
        ("{{ 99999999999999999999 }}", "64 bits"),
        ("{% if x %}", "syntax error in line 1"),
    ],
)
def test_unsupported_constructs_are_named(source: str, construct: str, tmp_path: Path) -> None:
    with pytest.raises(HetcompError, match=construct):
        compile_chat_template(folder_with(tmp_path, source))


def test_no_or_damaged_template(tmp_path: Path) -> None:
    assert compile_chat_template(tmp_path) is None
    with pytest.raises(HetcompError, match="neither a text nor a list"):
        compile_chat_template(folder_with(tmp_path, [{"name": "other", "template": "x"}]))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(HetcompError, match="is not a JSON object"):
        compile_chat_template(tmp_path)


def test_hostile_trees_and_contexts_are_refused(tmp_path: Path) -> None:
    compiled = compile_chat_template(folder_with(tmp_path, "{{ messages[0].content }}"))
    assert compiled is not None
    good = template_bytes(compiled)
    deep: dict[str, Any] = {"kind": "Const", "value": 1}
    for _ in range(300):
        deep = {"kind": "Not", "parts": [deep]}
    trees: list[Any] = [
        deep,
        {"kind": "Output"},
        {"kind": "Template", "body": [{"kind": "Exec"}]},
        {"kind": "Template", "body": [{"kind": "If"}]},
        {"kind": "Template", "body": [{"kind": "For", "parts": [{"kind": "Name", "name": "x"}]}]},
        {"kind": "Template", "body": [{"kind": "CallBlock", "parts": [{"kind": "Const"}]}]},
        {"kind": "Template", "body": 1},
        {"kind": 1},
        [],
    ]
    damaged = [
        b"",
        b"{}",
        b"[" * 100_000,
        good[:-5],
        b"\xff",
        *(template_bytes(compiled | {"template": t}) for t in trees),
    ]
    damaged.append(template_bytes(compiled | {"version": 2}))
    for data in damaged:
        with pytest.raises(HetcompError, match=r"The compiled chat template cannot be read: .+\."):
            NativeChatTemplate(data)
    with NativeChatTemplate(good) as native:
        nested: Any = "x"
        for _ in range(300):
            nested = [nested]
        for context in (
            [],
            {"messages": []},
            {"messages": "x"},
            {"messages": ["x"]},
            {"messages": [{"content": nested}]},
        ):
            with pytest.raises(HetcompError, match="The chat template"):
                native.render(context)  # type: ignore[arg-type]
        with pytest.raises(HetcompError, match="integer"):
            native.render({"messages": [{"content": 2**63}]})


@pytest.mark.parametrize(
    "source",
    [
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ range(100001) | list }}",
        "{% set ns = namespace(x=[]) %}{% for i in range(90000) %}{% set ns.x = [ns.x] %}{% endfor %}",
        "{% set ns = namespace(x=1) %}{% for i in range(90000) %}{% set ns.x = namespace(x=ns.x) %}{% endfor %}",
        "{% set ns = namespace(x={}) %}{% for i in range(90000) %}{% set ns.x = {1: ns.x} %}{% endfor %}",
        "{{ 'x' * 10000000 }}",
        "{{ 9223372036854775807 + 1 }}",
        "{{ 9223372036854775807 * 2 }}",
        "{{ 10 ** 30 }}",
        "{{ (-9223372036854775807 - 1) // -1 }}",
    ],
)
def test_runaway_templates_stop_with_a_message(source: str, tmp_path: Path) -> None:
    compiled = compile_chat_template(folder_with(tmp_path, source))
    assert compiled is not None
    with (
        NativeChatTemplate(template_bytes(compiled)) as native,
        pytest.raises(HetcompError, match="The chat template refuses the conversation: "),
    ):
        native.render({"messages": [{"role": "user", "content": "x"}]})


def test_a_template_that_renders_nothing_cannot_be_proven(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "{{ raise_exception('never') }}")
    compiled = compile_chat_template(folder)
    assert compiled is not None
    with pytest.raises(HetcompError, match="renders none"):
        prove_chat_template_parity(compiled, folder)
