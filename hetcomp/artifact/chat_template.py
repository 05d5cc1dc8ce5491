"""Compiles a model's Jinja2 chat template into a syntax tree that the C++ runtime evaluates.

jinja2 itself parses the template, with the settings of transformers; only nodes, filters, tests and methods
that the evaluator knows pass. A node of the tree is a JSON object:

    kind      the class of the jinja2 node
    name      Name, Filter, Test, Getattr, Macro, NSRef: the name
    value     Const: the constant
    names     Macro: its parameters. Compare: its operators. NSRef: [the attribute]
    parts     its operands in order. For: target, iterable, condition if any. Assign: target, value.
              Filter, Test, Call: what it is applied to, then the arguments. Macro: the defaults of its last
              parameters.
              Dict: key, value, key, value, ... Slice: start, stop, step (a Const null where not given)
    named     Filter, Test, Call: keyword arguments
    body      statements of Template, If, For, Macro, AssignBlock, Scope. CallBlock: [the Macro `caller`]
    else      statements of the else branch of If (an elif is an If in it) and For
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hetcomp.errors import HetcompError

Json = dict[str, Any]

CHAT_TEMPLATE_FILE = "chat_template.hetc.json"
# The names that transformers hands to a template from tokenizer_config.json.
_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# What runtime_lib/src/template_filters.cpp and template_methods.cpp define.
_FILTERS = frozenset(
    "abs attr capitalize count d default dictsort first float indent int items join last length list "
    "lower map max min reject rejectattr replace reverse safe select selectattr sort string sum title "
    "tojson trim unique upper".split()
)
_TESTS = frozenset(
    "boolean callable defined divisibleby eq equalto even false float ge greaterthan gt in integer "
    "iterable le lessthan lower lt mapping ne none number odd sameas sequence string true undefined "
    "upper == != < <= > >=".split()
)
_METHODS = frozenset(
    "strip lstrip rstrip split rsplit splitlines startswith endswith upper lower replace title "
    "capitalize join find rfind index count isdigit isalpha isalnum isspace isupper islower "
    "removeprefix removesuffix items keys values get copy cycle changed".split()
)
_UNKNOWN_GLOBALS = frozenset("lipsum cycler joiner self super varargs kwargs".split())
_BINARY = (
    nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Pow, nodes.And, nodes.Or,
)  # fmt: skip
_UNARY = (nodes.Not, nodes.Neg, nodes.Pos)


def compile_chat_template(folder: Path) -> Json | None:
    """The chat template of the model in ``folder`` as a JSON object for ``chat_template.hetc.json``.

    None if the model has none. A ``tool_use`` template beside ``default`` is used when tools are given, as in
    transformers. Raises HetcompError naming the construct that is not supported, or the file that is damaged.
    """
    config = _config(folder)
    sources = _sources(folder, config)
    if not sources:
        return None
    trees = {name: _parse(source, name) for name, source in sources.items()}
    tree = trees["default"]
    if "tool_use" in trees:
        given = {"kind": "Test", "name": "none", "parts": [{"kind": "Name", "name": "tools"}]}
        choice = {"kind": "If", "parts": [given], "body": tree["body"], "else": trees["tool_use"]["body"]}
        tree = {"kind": "Template", "body": [choice]}
    tokens = {name: text for name in _TOKEN_NAMES if (text := _token_text(config.get(name))) is not None}
    return {"format": "hetcomp-chat-template", "version": 1, "tokens": tokens, "template": tree}


def template_bytes(compiled: Json) -> bytes:
    """The contents of ``chat_template.hetc.json``: UTF-8, one line."""
    return json.dumps(compiled, ensure_ascii=False, separators=(",", ":")).encode()


def template_sources(folder: Path) -> dict[str, str]:
    """The Jinja2 sources of a model folder by name (``default``, ``tool_use``); empty if it has none."""
    return _sources(folder, _config(folder))


def special_tokens(folder: Path) -> dict[str, str]:
    """The texts of the special tokens that templates may name (``bos_token``, ...)."""
    config = _config(folder)
    return {name: text for name in _TOKEN_NAMES if (text := _token_text(config.get(name))) is not None}


def _config(folder: Path) -> Json:
    config: Json = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / file
        if not path.is_file():
            continue
        try:
            config |= json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, TypeError) as error:
            raise HetcompError(f"{path} is not a JSON object: {error}; download it again.") from error
    return config


def _token_text(token: object) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _sources(folder: Path, config: Json) -> dict[str, str]:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return {"default": path.read_text(encoding="utf-8")}
    template = config.get("chat_template")
    if template is None:
        return {}
    if isinstance(template, str):
        return {"default": template}
    try:
        named = {entry["name"]: entry["template"] for entry in template}
        return {"default": named["default"]} | {k: v for k, v in named.items() if k == "tool_use"}
    except (KeyError, TypeError) as error:
        raise HetcompError(
            f"The chat_template of {folder / 'tokenizer_config.json'} is neither a text nor a list of named "
            "templates with one called 'default'; compile without a chat template."
        ) from error


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's tokens for training; for rendering it is only a scope."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _parse(source: str, name: str) -> Json:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    try:
        tree = environment.parse(source)
    except jinja2.TemplateSyntaxError as error:
        raise HetcompError(
            f"The chat template {name!r} has a syntax error in line {error.lineno}: {error.message}; "
            "compile without a chat template."
        ) from error
    return {"kind": "Template", "body": _statements(tree.body)}


def _refuse(construct: str, node: nodes.Node) -> HetcompError:
    return HetcompError(
        f"The chat template uses {construct} (line {node.lineno}), which hetcomp does not support; "
        "compile without a chat template."
    )


def _statements(statements: list[nodes.Node]) -> list[Json]:
    return [_statement(statement) for statement in statements]


def _statement(node: nodes.Node) -> Json:
    kind = type(node).__name__
    match node:
        case nodes.Output():
            return {"kind": kind, "parts": [_printed(part) for part in node.nodes]}
        case nodes.If():
            otherwise = _statements(node.else_)
            for branch in reversed(node.elif_):
                otherwise = [_if(branch, otherwise)]
            return _if(node, otherwise)
        case nodes.For():
            if node.recursive:
                raise _refuse("a recursive for", node)
            parts = [_target(node.target), _expression(node.iter)]
            if node.test is not None:
                parts.append(_expression(node.test))
            return {
                "kind": kind,
                "parts": parts,
                "body": _statements(node.body),
                "else": _statements(node.else_),
            }
        case nodes.Assign():
            return {"kind": kind, "parts": [_target(node.target), _expression(node.node)]}
        case nodes.AssignBlock():
            if node.filter is not None:
                raise _refuse("a filter on a set block", node)
            return {"kind": kind, "parts": [_target(node.target)], "body": _statements(node.body)}
        case nodes.Macro():
            return _macro(node, node.name)
        case nodes.CallBlock():
            return {"kind": kind, "parts": [_expression(node.call)], "body": [_macro(node, "caller")]}
        case nodes.Scope():
            return {"kind": kind, "body": _statements(node.body)}
        case nodes.Break() | nodes.Continue():
            return {"kind": kind}
    raise _refuse(f"the statement {kind}", node)


def _if(node: nodes.If, otherwise: list[Json]) -> Json:
    return {
        "kind": "If",
        "parts": [_expression(node.test)],
        "body": _statements(node.body),
        "else": otherwise,
    }


def _macro(node: nodes.Macro | nodes.CallBlock, name: str) -> Json:
    return {
        "kind": "Macro", "name": name, "names": [argument.name for argument in node.args],
        "parts": [_expression(default) for default in node.defaults], "body": _statements(node.body),
    }  # fmt: skip


def _target(node: nodes.Node) -> Json:
    match node:
        case nodes.Name():
            return {"kind": "Name", "name": node.name}
        case nodes.NSRef():
            return {"kind": "NSRef", "name": node.name, "names": [node.attr]}
        case nodes.Tuple():
            return {"kind": "Tuple", "parts": [_target(item) for item in node.items]}
    raise _refuse(f"{type(node).__name__} as the target of an assignment", node)


def _printed(node: nodes.Node) -> Json:
    # Markup escapes what is added to it, so `safe` is only harmless where its result is printed at once.
    if isinstance(node, nodes.Filter) and node.name == "safe" and node.node is not None:
        return {"kind": "Filter", "name": "string", "parts": [_printed(node.node)]}
    return _expression(node)


def _expression(node: nodes.Node) -> Json:
    kind = type(node).__name__
    match node:
        case nodes.TemplateData():
            return {"kind": "Const", "value": node.data}
        case nodes.Const():
            if isinstance(node.value, int) and not -(2**63) <= node.value < 2**63:
                raise _refuse("an integer of more than 64 bits", node)
            return {"kind": kind, "value": node.value}
        case nodes.Name():
            if node.name in _UNKNOWN_GLOBALS:
                raise _refuse(f"the global {node.name!r}", node)
            return {"kind": kind, "name": node.name}
        case nodes.Tuple() | nodes.List():
            return {"kind": kind, "parts": [_expression(item) for item in node.items]}
        case nodes.Dict():
            return {
                "kind": kind,
                "parts": [_expression(x) for pair in node.items for x in (pair.key, pair.value)],
            }
        case nodes.CondExpr():
            branches = [node.test, node.expr1, *([node.expr2] if node.expr2 is not None else [])]
            return {"kind": kind, "parts": [_expression(branch) for branch in branches]}
        case nodes.Compare():
            parts = [_expression(node.expr), *(_expression(operand.expr) for operand in node.ops)]
            return {"kind": kind, "names": [operand.op for operand in node.ops], "parts": parts}
        case nodes.Concat():
            return {"kind": kind, "parts": [_expression(part) for part in node.nodes]}
        case nodes.Getattr():
            return {"kind": kind, "name": _attribute(node), "parts": [_expression(node.node)]}
        case nodes.Getitem():
            return {"kind": kind, "parts": [_expression(node.node), _expression(node.arg)]}
        case nodes.Slice():
            bounds = (node.start, node.stop, node.step)
            none = {"kind": "Const", "value": None}
            return {
                "kind": kind,
                "parts": [none if bound is None else _expression(bound) for bound in bounds],
            }
    if isinstance(node, _UNARY):
        return {"kind": kind, "parts": [_expression(node.node)]}
    if isinstance(node, _BINARY):
        if isinstance(node, nodes.Mod) and isinstance(node.left, nodes.Const) and isinstance(node.left.value, str):
            raise _refuse("formatting with '%'", node)
        return {"kind": kind, "parts": [_expression(node.left), _expression(node.right)]}
    if isinstance(node, nodes.Filter | nodes.Test | nodes.Call):
        return _call(node)
    raise _refuse(f"the expression {kind}", node)


def _attribute(node: nodes.Getattr) -> str:
    if node.attr.startswith("_"):
        raise _refuse(f"the private attribute {node.attr!r}", node)
    return node.attr


def _call(node: nodes.Filter | nodes.Test | nodes.Call) -> Json:
    kind = type(node).__name__
    if node.dyn_args is not None or node.dyn_kwargs is not None:
        raise _refuse("* or ** arguments", node)
    compiled: Json = {"kind": kind}
    applied = node.node
    if applied is None:  # the bare filter of a filter block
        raise _refuse(f"a {kind.lower()} without a value", node)
    if isinstance(node, nodes.Call):
        if isinstance(node.node, nodes.Getattr) and node.node.attr not in _METHODS:
            raise _refuse(f"the method .{node.node.attr}()", node)
    else:
        known = _FILTERS if isinstance(node, nodes.Filter) else _TESTS
        if node.name not in known:
            raise _refuse(f"the {kind.lower()} {node.name!r}", node)
        if node.name == "safe":
            raise _refuse("the filter 'safe' on a value that is used further", node)
        _check_inner(node)
        compiled["name"] = node.name
    compiled["parts"] = [_expression(applied), *(_expression(argument) for argument in node.args)]
    if node.kwargs:
        compiled["named"] = {pair.key: _expression(pair.value) for pair in node.kwargs}
    return compiled


def _check_inner(node: nodes.Filter | nodes.Test) -> None:
    """The filter or test that map, select and their like are given by name must be known too."""
    position = {"map": 0, "select": 0, "reject": 0, "selectattr": 1, "rejectattr": 1}.get(node.name)
    if not isinstance(node, nodes.Filter) or position is None or len(node.args) <= position:
        return
    inner = node.args[position]
    known = _FILTERS - {"safe"} if node.name == "map" else _TESTS
    if not isinstance(inner, nodes.Const) or inner.value not in known:
        raise _refuse(f"{getattr(inner, 'value', 'a computed name')!r} inside the filter {node.name!r}", node)
