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
TEMPLATES = sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))
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
EXPRESSIONS = """
s.strip() | s.lstrip() | s.rstrip() | s.strip(' H\\n') | s | length | s.split() | s.split(' ', 1) | s.rsplit(' ', 2) | s.rsplit(None, 1) | s.split(None, 1) | s.rsplit()
s.split('l') | word.split('b', 0) | word.rsplit('b', 1) | lines.splitlines() | lines.splitlines(true)
word.startswith('abc') | word.endswith(('x', 'bc')) | word.replace('b', '') | word.replace('', '-') | word.replace('', '-', 2) | word.replace('a', 'X', 1)
word.find('c') | word.rfind('c') | word.find('zz') | word.index('c') | word.index('zz') | word.count('bc') | word.count('')
s.upper() | s.lower() | s.title() | s.capitalize() | word.removeprefix('ab') | word.removesuffix('bc') | '12'.isdigit() | 'a1'.isalpha()
'a1²'.isalnum() | ' \\t'.isspace() | 'AB1'.isupper() | 'ab'.islower() | ', '.join(mixed) | ','.join(xs) | '-'.join('abc')
s|trim | s|upper | s|lower | s|capitalize | s|title | "it's a-b (c) [d]"|title | s|replace('l', 'L') | s|length | s|first | s|last | s|list
s|reverse | 'x'|default('y') | missing|default('y') | empty|default('y', true) | nothing|default('y') | missing|d | nothing|string | xs|string
xs|join | xs|join(', ') | rows|join(',', attribute='k') | xs|first | xs|last | []|first | []|last | xs|sum | xs|max | mixed|min | xs|sort
xs|sort(reverse=true) | mixed|sort | mixed|sort(case_sensitive=true) | rows|sort(attribute='k')|map(attribute='k')|list | xs|unique|list
mixed|unique|list | xs|reverse|list | xs|map('string')|list | xs|map('default', 1)|join | rows|map(attribute='v.w', default=0)|list
rows|map(attribute='v.w')|list | xs|select('odd')|list | xs|reject('equalto', 1)|list | xs|select|list | rows|selectattr('k', 'equalto', 'x')|list
rows|selectattr('v')|list|length | rows|rejectattr('v', 'defined')|list | rows|selectattr('v.w', '>', 1)|list | rows|selectattr('v', 'none')|list
rows|selectattr('k', 'in', ['y'])|map(attribute='k')|first | d|items|list | d.items()|list | d.keys()|list | d.values()|list | d|list | d|length
d['items'] | d.get('b') | d.get('zz') | d.get('zz', 5) | d|dictsort | d|dictsort(by='value', reverse=true) | d|dictsort(reverse=true)|first
d|tojson | d|tojson(indent=2) | d|tojson(sort_keys=true) | d|tojson(ensure_ascii=true) | d|tojson(separators=(',', ':')) | d|tojson(indent=0)
quotes|tojson | quotes|tojson(ensure_ascii=true) | missing|tojson | (1,2)|tojson | rows|tojson(indent=4) | '5'|int | '5.7'|int | 'x'|int
'x'|int(9) | 'ff'|int(base=16) | f|int | yes|int | nothing|int | '2.5'|float | 'x'|float(1.5) | n|float | neg|abs | f|abs | 'abc'|abs
lines|indent | lines|indent(2, true) | lines|indent(2, false, true) | lines|indent('> ') | f | big | small | 1e16 | 123456789.125 | 0.1 + 0.2 | 1.0
n + 1 | n - 10 | n * 2.0 | n / 2 | n // 2 | neg // 2 | n % 3 | neg % 3 | n % -3 | -7.5 // 2 | -7.5 % 2 | 2 ** 10 | 2 ** -1 | -n | +f | - yes
n / 0 | n % 0 | 9223372036854775807 // 2 | xs + [9] | word * 2 | 2 * [1, 2] | word + 1 | word + nothing | [1] + (2,) | nothing + 1 | word ~ 1 ~ nothing
n == 7 | n == 7.0 | yes == 1 | 'a' == 1 | xs == [3, 1, 2, 1] | (1, 2) == [1, 2] | d == d | nothing == false | missing == missing2 | missing == nothing
1 < 2 < 3 | 1 < 3 < 2 | 'a' < 'b' | [1, 2] < [1, 3] | 'a' < 1 | nothing < 1 | missing < 1 | 'a' in word | 'z' not in word | 1 in xs | 'b' in d
1 in word | 'x' in missing | 'x' in nothing | not missing | not xs | yes and n | no or n | nothing or missing or 'z' | yes if no | (yes if no) is defined
n if yes else f | xs[0] | xs[-1] | xs[9] | xs['a'] | word[1] | s[9] | word[-7] | xs[1:] | xs[:-1] | xs[::-1] | word[::2] | word[4:1:-1] | s[8:12] | xs[5:] | xs[-99:2]
d[1:2] | d.b | d.zz | d.zz.y | d['zz']['y'] | missing.x | missing['x'] | nothing.x | nothing['x'] | nothing.x.y | n.x | d.a[1] | d['ü'].n | rows[0].v.w
missing | nothing | yes | [] | {} | {'a': 1, 'b': [1, none]} | (1,) | () | (1, 'x') | [none, true, 1.5, 'it\\'s', "q\\"q", quotes] | d
n is defined | missing is defined | missing is undefined | missing is none | nothing is none | word is string | n is string | d is mapping | xs is mapping
xs is iterable | word is iterable | n is iterable | missing is iterable | xs is sequence | d is sequence | n is number | yes is number | f is number | yes is integer
n is integer | f is float | yes is boolean | n is boolean | yes is true | n is true | no is false | n is odd | n is even | n is divisibleby(7) | n is divisibleby 2
'a' is in ['a'] | n is sameas 7 | n is eq 7 | n is ne 7 | n is gt 3 | n is lt 3 | 'ABC' is upper | 'abc' is lower | f is not integer | range is callable | n is callable
range(3)|list | range(1, 10, 4)|list | range(5, 0, -2)|list | range(0)|list | range(1000001)|length | dict(a=1, b='x') | dict(d, z=1).z | namespace(a=1).a
raise_exception('no') | missing() | n() | xs|map(attribute='x')|list | (xs|select('odd')) is sequence | 'y' if xs|select('none') else 'n' | xs|select('odd')|first
xs|select('odd')|length | xs|map('upper')|join | xs.index(2) | xs.count(1) | xs.index(99) | d.pop('b') | xs|abs | n|length | n|list | missing|items|list
missing|length | missing|list | missing|join | missing|upper | missing|first | missing ~ 'x' | missing + 'x' | 'x' + missing | -missing | missing|map('upper')|list
d|length > 2 and d.b | word|replace('a','b')|upper|first | {'a': {'b': 'c'}}.a.b | [[1,2],[3]]|map('length')|list | [[1,2],[3]]|map('first')|sum | 1 if none else 2
""".strip()
STATEMENTS = [
    "{% for x in xs %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}"
    "{{ loop.length }}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.cycle('a', 'b') }}{{ loop.changed(x) }};{% endfor %}",
    "{% for x in xs if x != 1 %}{{ loop.index }}/{{ loop.length }}={{ x }},{% else %}none{% endfor %}",
    "{% for x in [] %}a{% else %}empty{% endfor %}{% for x in missing %}a{% else %}undef{% endfor %}",
    "{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}{% for k in d %}{{ k }}{% endfor %}{% for c in 'añ漢' %}{{ c }},{% endfor %}",
    "{% for a, b in [(1, 2), [3, 4]] %}{{ a }}{{ b }}{% endfor %}{% for a, b in [(1, 2, 3)] %}{{ a }}{% endfor %}",
    "{% for x in n %}{% endfor %}",
    "{% for x in xs %}{% if x == 2 %}{% break %}{% endif %}{% if x == 1 %}{% continue %}{% endif %}{{ x }}{% endfor %}",
    "{% for i in xs %}{% for j in xs %}{{ loop.index }}{% if j == 1 %}{% break %}{% endif %}{% endfor %}-{{ loop.depth }}{% endfor %}",
    "{% set x = 1 %}{% for i in xs %}{% set x = x + i %}{{ x }},{% endfor %}{{ x }}{% for x in xs %}{% endfor %}{{ x }}",
    "{% set ns = namespace(t=0, l=[]) %}{% for i in xs %}{% set ns.t = ns.t + i %}{% set ns.l = ns.l + [i] %}{% endfor %}{{ ns.t }}{{ ns.l }}",
    "{% set q = 5 %}{% set q.x = 1 %}",
    "{% if missing %}a{% elif nothing %}b{% elif xs %}c{% else %}d{% endif %}{% if empty %}a{% elif 0 %}b{% else %}d{% endif %}",
    "{% set a, b = 1, 'x' %}{{ a }}{{ b }}{% set t %} block {{ a }} {% endset %}[{{ t }}]{{ t | trim }}",
    "{% macro m(a, b=2, c=a) %}<{{ a }},{{ b }},{{ c }}>{% endmacro %}{{ m(1) }}{{ m(1, c=5) }}{{ m() }}{{ m(b=1, a=0) }}{{ m(1)|length }}",
    "{% macro m(a) %}x{% endmacro %}{{ m(1, 2) }}",
    "{% macro m(a) %}x{% endmacro %}{{ m(z=2) }}",
    "{% macro f(k) %}{% if k > 0 %}{{ k }}{{ f(k - 1) }}{% endif %}{% endmacro %}{{ f(5) }}",
    "{% set y = 1 %}{% macro m() %}{{ y }}{{ z }}{% set y = 9 %}{{ y }}{% endmacro %}{% set z = 2 %}{{ m() }}{{ y }}",
    "{% macro box(t) %}[{{ t }}{{ caller() }}]{% endmacro %}{% call box('a') %}in {{ n }}{% endcall %}",
    "{% macro each(l) %}{% for i in l %}{{ caller(i) }}{% endfor %}{% endmacro %}{% call(x) each(xs) %}({{ x }}){% endcall %}",
    "{% for x in xs %}\n  {% if x == 1 %}\n  one\n  {% endif %}\n{%- endfor %}\n\n tail {# comment #}\n",
    "a\n{%- set x = 1 -%}\n b {{- x -}} c\n   {% raw %}{{ x }}{% endraw %}\n",
    "{% generation %}{% set inner = 1 %}text {{ inner }}{% endgeneration %}{{ inner }}",
    "{% set xs = xs | select('odd') %}{{ xs | list }}{{ xs | list }}",
    "{{ rows[0] | tojson | safe }}{{ '<b>' | safe }}{{ '<i>' }}",
    "{{ messages | length }}{{ tools }}{{ add_generation_prompt }}{{ undefined_thing }}",
    "{% set d2 = {'k': [1]} %}{% for k, v in d2 | items %}{{ k }}{{ v[0] }}{% endfor %}{{ d2.k.append(1) }}",
    "{% set x = namespace() %}{{ x.nope }}{{ x.nope is defined }}{% set x.nope = none %}{{ x.nope is none }}",
]


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


def expressions() -> list[str]:
    """The cells of the table: a bar with spaces around it separates, a filter's bar has none on its left."""
    cells = [cell.strip() for line in EXPRESSIONS.splitlines() for cell in line.split(" | ")]
    return [cell for cell in cells if cell]


def test_expressions_are_those_of_jinja(tmp_path: Path) -> None:
    context = {"messages": [{"role": "user", "content": "x"}], "tools": None, "add_generation_prompt": False, **CONTEXT}
    wrong = []
    for expression in expressions():
        source = "[{{ " + expression + " }}]"
        expected, got = reference(source, context), ours(source, context, tmp_path)
        if expected != got:
            wrong.append((expression, expected, got))
    assert not wrong
    assert len(expressions()) > 300


@pytest.mark.parametrize("source", STATEMENTS)
def test_statements_are_those_of_jinja(source: str, tmp_path: Path) -> None:
    context = {"messages": [{"role": "user", "content": "x"}], "tools": None, "add_generation_prompt": False, **CONTEXT}
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
    damaged = [b"", b"{}", b"[" * 100_000, good[:-5], b"\xff", *(template_bytes(compiled | {"template": t}) for t in trees)]
    damaged.append(template_bytes(compiled | {"version": 2}))
    for data in damaged:
        with pytest.raises(HetcompError, match=r"The compiled chat template cannot be read: .+\."):
            NativeChatTemplate(data)
    with NativeChatTemplate(good) as native:
        nested: Any = "x"
        for _ in range(300):
            nested = [nested]
        for context in ([], {"messages": []}, {"messages": "x"}, {"messages": ["x"]}, {"messages": [{"content": nested}]}):
            with pytest.raises(HetcompError, match="The chat template"):
                native.render(context)  # type: ignore[arg-type]
        with pytest.raises(HetcompError, match="integer"):
            native.render({"messages": [{"content": 2**63}]})


@pytest.mark.parametrize(
    "source",
    [
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ range(100001) | list }}",
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
