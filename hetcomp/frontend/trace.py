"""torch.export of a meta-device model into a clean fx graph: the import dialect, left behind by lowering."""

from __future__ import annotations

import copy
import logging
import operator
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hetcomp.errors import HetcompError
from hetcomp.frontend.hooks import TracingCache, tracing_hooks
from hetcomp.frontend.traced_model import WRAPPER, TracedModel, module_path

# Any length that a step may have; the Plan's own bound of T is set when it is lowered.
_LONGEST_STEP = 1 << 20
_EXAMPLE_TOKENS = 8


class _Step(nn.Module):
    """One step as the Plan sees it: ids and positions in, logits of all positions out, caches outside."""

    def __init__(self, model: PreTrainedModel, context: int) -> None:
        super().__init__()
        self.m = model
        self.context = context

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        cache = TracingCache(self.context, self.m)
        out = self.m(input_ids=input_ids, position_ids=position_ids, past_key_values=cache, use_cache=True)
        logits: Tensor = out.logits
        return logits


def meta_model(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The model in float32 on the meta device: no memory. The Plan's activations are float32 throughout, so
    the trace has no casts. Raises HetcompError if transformers cannot build it from the config."""
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    config.use_cache = True
    for flag in ("output_router_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, flag, False):
            setattr(config, flag, False)
    try:
        with torch.device("meta"):
            model = model_class(config)
    except HetcompError:
        raise
    except Exception as error:
        raise HetcompError(
            f"transformers cannot build {model_class.__name__} from this config: "
            f"{type(error).__name__}: {_first_line(error)}"
        ) from error
    return model.float().eval()


def trace(model: PreTrainedModel, context: int) -> TracedModel:
    """Traces ``model`` (from :func:`meta_model`) with a dynamic number of tokens.

    Raises HetcompError naming the class and torch's own first line if torch.export refuses.
    """
    shapes = {k: tuple(v.shape) for k, v in [*model.named_parameters(), *model.named_buffers()]}
    names = frozenset(shapes)
    ids = torch.zeros((1, _EXAMPLE_TOKENS), dtype=torch.long, device="meta")
    tokens = torch.export.Dim("T", min=1, max=_LONGEST_STEP)
    dynamic = {"input_ids": {1: tokens}, "position_ids": {1: tokens}}
    with torch.no_grad(), _quiet(), tracing_hooks(model, context) as hooks:
        step = _Step(model, context)
        try:
            program = torch.export.export(step, (ids, ids.clone()), dynamic_shapes=dynamic, strict=False)
        except HetcompError:
            raise
        except Exception as error:
            raise HetcompError(
                f"torch.export cannot trace {type(model).__name__}: {type(error).__name__}: {_first_line(error)}"
            ) from error
    canonical = _canonical_names(model)
    fqns = _parameter_names(program, canonical)
    user_inputs = tuple(program.graph_signature.user_inputs)
    graph = program.graph
    clean(graph)
    return TracedModel(
        graph=graph,
        fqns=fqns,
        inputs=(str(user_inputs[0]), str(user_inputs[1])),
        rope_tables=tuple(hooks.rope_tables),
        context=context,
        parameter_names=names,
        parameter_shapes=shapes,
        aliases=_aliases_by_name(canonical),
        computed_buffers=_computed_buffers(model),
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else ""


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.export and transformers log advice for people who train; it would only confuse here."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _canonical_names(model: PreTrainedModel) -> dict[str, str]:
    """Every parameter's name -> the first name of the same parameter."""
    first: dict[int, str] = {}
    everything = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {name: first.setdefault(id(tensor), name) for name, tensor in everything}


def _computed_buffers(model: PreTrainedModel) -> frozenset[str]:
    """Buffers that the model computes when it is built."""
    return frozenset(
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    )


def _aliases_by_name(canonical: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """The other names of tied parameters by their first name."""
    out: dict[str, tuple[str, ...]] = {}
    for name, first in canonical.items():
        if name != first:
            out[first] = (*out.get(first, ()), name)
    return out


def _parameter_names(program: torch.export.ExportedProgram, canonical: dict[str, str]) -> dict[str, str]:
    """Placeholder -> parameter name, tied parameters under the first of their names."""
    out = {}
    for spec in program.graph_signature.input_specs:
        if spec.target is not None:
            name = spec.target.removeprefix(WRAPPER)
            out[spec.arg.name] = canonical.get(name, name)
    return out


# ---------------------------------------------------------------- cleaning

_DROPPED = (
    "aten._assert_tensor_metadata",
    "aten._assert_scalar",
    "aten._assert_async",
    "aten.sym_constrain_range",
    "aten.sym_constrain_range_for_size",
)
_IDENTITY = ("aten.alias", "aten.detach", "aten.detach_", "aten.lift_fresh_copy", "aten.dropout")
_CASTS = ("aten.to", "aten._to_copy", "aten.type_as")


def clean(graph: fx.Graph) -> None:
    """Drops what computes nothing and turns in-place ops into their functional forms."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        name = _packet(node)
        if name in _DROPPED:
            graph.erase_node(node)
        elif name in _IDENTITY or (name in _CASTS and _same_type(node)) or _whole_slice(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif name.startswith("aten.") and name.endswith("_") and not name.endswith("__"):
            _functionalise(graph, node)
    graph.eliminate_dead_code(_is_impure)


def _is_impure(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output")


def _packet(node: fx.Node) -> str:
    return ".".join(str(node.target).split(".")[:2])


def _same_type(node: fx.Node) -> bool:
    source = node.args[0]
    return isinstance(source, fx.Node) and bool(source.meta["val"].dtype == node.meta["val"].dtype)


def _whole_slice(node: fx.Node) -> bool:
    """True for x[:] over a whole dimension: same shape and a step of 1 means that nothing was cut."""
    if node.target is not torch.ops.aten.slice.Tensor:
        return False
    step = node.args[4] if len(node.args) > 4 else 1
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return bool(step == 1) and all(
        a is b or str(a) == str(b) for a, b in zip(source.meta["val"].shape, node.meta["val"].shape, strict=True)
    )


def _functionalise(graph: fx.Graph, node: fx.Node) -> None:
    """x.op_(...) -> y = x.op(...), with y in place of x from here on.

    That is right if nothing else sees x's memory: refused if x is a view of something still used.
    """
    target = node.args[0]
    assert isinstance(target, fx.Node)
    order = {n: i for i, n in enumerate(graph.nodes)}
    for other in _aliases(target):
        if any(order[user] > order[node] for user in other.users):
            raise HetcompError(
                f"{module_path(node)}: {node.target} writes into a view that is read later, which hetcomp cannot trace"
            )
    packet, overload = str(node.target).removeprefix("aten.").split(".")
    functional = getattr(getattr(torch.ops.aten, packet.removesuffix("_"), None), overload, None)
    if functional is None:
        raise HetcompError(f"{module_path(node)}: {node.target} has no functional form")
    with graph.inserting_before(node):
        new = graph.call_function(functional, node.args, node.kwargs)
    new.meta = dict(node.meta)
    for user in list(target.users):
        if order.get(user, -1) > order[node]:
            user.replace_input_with(target, new)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


_VIEWS = (
    "aten.view",
    "aten.reshape",
    "aten.slice",
    "aten.select",
    "aten.transpose",
    "aten.permute",
    "aten.unsqueeze",
    "aten.squeeze",
    "aten.expand",
    "aten.chunk",
    "aten.split",
    "aten.split_with_sizes",
    "aten.flatten",
)


def _aliases(node: fx.Node) -> list[fx.Node]:
    """What shares memory with ``node``, itself left out: what it is a view of, and views of it."""
    out: list[fx.Node] = []
    below = node
    while below.op == "call_function" and (_packet(below) in _VIEWS or below.target is operator.getitem):
        source = below.args[0]
        if not isinstance(source, fx.Node):
            break
        out.append(source)
        below = source
    out.extend(u for u in node.users if u.op == "call_function" and _packet(u) in _VIEWS)
    return out
