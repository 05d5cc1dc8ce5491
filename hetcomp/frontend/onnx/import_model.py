"""From an .onnx file to what a trace of transformers gives: a torch graph, facts, and a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hetcomp.errors import HetcompError
from hetcomp.frontend.onnx.branches import without_branches
from hetcomp.frontend.onnx.checkpoint import OnnxCheckpoint
from hetcomp.frontend.onnx.evaluate import Evaluator, Run, kind_of, step_sizes, table_rows
from hetcomp.frontend.onnx.graph import Graph, Node
from hetcomp.frontend.onnx.model_facts import UNKNOWN_POSITIONS, ModelFacts, exported_info, model_facts
from hetcomp.frontend.onnx.model_file import OnnxFile, open_model
from hetcomp.frontend.onnx.parameters import Parameters
from hetcomp.frontend.onnx.recognise_attention import replace_attention
from hetcomp.frontend.onnx.recognise_linear_attention import replace_linear_attention
from hetcomp.frontend.onnx.recognise_norm import replace_norms
from hetcomp.frontend.onnx.recognise_rope import replace_ropes
from hetcomp.frontend.onnx.to_fx import count_layers, to_fx
from hetcomp.frontend.onnx.written_out import written_out
from hetcomp.frontend.traced_model import TracedModel
from hetcomp.ir.plan import ModelInfo

# Positions that a graph without caches is tried for, and takes: a mask of them has 4 million numbers.
_MOST_WITHOUT_CACHES = 2048
_EMBEDDINGS = ("Gather", "com.microsoft.GatherBlockQuantized")


@dataclass(frozen=True)
class OnnxModel:
    """A file whose graph was read. ``graph`` has attention, norms and rotary embeddings as hetcomp's ops; ``run``: the
    values of the graph as it was. ``unread``: tensors of the file that the logits do not depend on.
    ``exported``: facts and config of a model that hetcomp exported. ``by_length``: the nodes that compute something
    else for long sequences."""

    file: OnnxFile
    facts: ModelFacts
    graph: Graph
    run: Run
    positions: int
    unread: frozenset[str]
    exported: tuple[ModelInfo, dict[str, Any]] | None
    by_length: tuple[str, ...]


def read_model(path: Path, context: int | None = None) -> OnnxModel:
    """Recognises what ``path`` computes for sequences of up to ``context`` positions, None: for as many as it can.
    Raises HetcompError naming a node or tensor that hetcomp cannot compile."""
    file = open_model(path)
    facts = model_facts(path.parent)
    exported = exported_info(file.metadata, str(path))
    positions = context or (exported[0].max_positions if exported else facts.positions or UNKNOWN_POSITIONS)
    evaluator = Evaluator(file)
    graph = file.graph.replaced({}, file.graph.outputs[:1])
    straight = without_branches(graph, evaluator, positions, str(path))
    graph = _with_inputs(written_out(straight.graph, str(path)))
    unread = frozenset(graph.initialisers) - {v for node in graph.nodes for v in node.inputs}
    run = evaluator.run(graph, *step_sizes(graph))
    positions = min([positions, *table_rows(graph, run)])
    positions, far = _far(evaluator, graph, run, positions)
    graph = replace_norms(_without_empty_parts(graph, run), run)
    graph = replace_attention(graph, run, far, str(path))
    graph = replace_linear_attention(graph, run, str(path))
    graph = replace_ropes(graph, run, far[0], str(path))
    return OnnxModel(file, facts, graph, run, positions, unread, exported, straight.by_length)


def _without_empty_parts(graph: Graph, run: Run) -> Graph:
    """What is joined to nothing stays what it is: transformers' caches begin as empty tensors."""
    new: dict[str, list[Node]] = {}
    for node in (n for n in graph.nodes if n.op == "Concat"):
        filled = [v for v in node.inputs if run.values[v].numel()]
        if len(filled) == 1:
            new[node.outputs[0]] = [replace(node, op="Identity", inputs=tuple(filled))]
    return graph.replaced(new, graph.outputs)


def _far(evaluator: Evaluator, graph: Graph, run: Run, positions: int) -> tuple[int, list[Run]]:
    """Runs that show how far a token looks back, and the positions that they speak for. Without caches all tokens of a
    run are new, and masks have a row for each."""
    if not run.past and not any(node.op.startswith("hetcomp.") for node in graph.nodes):
        positions = min(positions, _MOST_WITHOUT_CACHES)
        return positions, [evaluator.run(graph, tokens, 0) for tokens in (positions, positions * 3 // 4 + 1)]
    steps = (positions - 1, positions * 3 // 4) if run.past else (0,)
    return positions, [evaluator.run(graph, 1, past) for past in steps]


def _with_inputs(graph: Graph) -> Graph:
    used = {v for node in graph.nodes for v in node.inputs}
    return Graph(graph.nodes, {n: i for n, i in graph.inputs.items() if n in used}, graph.outputs, graph.initialisers)


def traced_model(model: OnnxModel, context: int) -> tuple[TracedModel, OnnxCheckpoint]:
    """The torch graph and where its weights are."""
    if model.by_length:
        model = read_model(model.file.path, context)
    origin = str(model.file.path)
    ids = [name for name, given in model.graph.inputs.items() if kind_of(given, model.file) == "ids"]
    if len(ids) != 1:
        raise HetcompError(f"{origin} has no input of token ids (input_ids), so it is no language model")
    parameters = Parameters()
    traced = to_fx(model.graph, model.run, parameters, ids[0], context, origin, model.facts.provider)
    notes = tuple(
        f"{node} does at all positions what it does in sequences of {context} positions, since that is the context; a "
        "smaller one does what it does in shorter sequences"
        for node in model.by_length
    )
    traced = replace(traced, notes=notes)
    return traced, OnnxCheckpoint(model.file, parameters.all, model.unread)


def model_info(model: OnnxModel, config_sha256: str) -> ModelInfo:
    """Facts for the Plan. Raises HetcompError if the graph is no language model with attention."""
    logits = model.graph.outputs[0]
    layers = count_layers(model.graph)
    table = next((n for n in model.graph.nodes if n.op in _EMBEDDINGS and n.inputs[0] in model.run.weights), None)
    if not layers or table is None or not model.run.is_activation(logits):
        raise HetcompError(
            f"{model.file.path}: its first output {logits} is not made from token ids through attention, so it is no "
            "language model"
        )
    if model.exported is not None:
        return model.exported[0]
    return ModelInfo(
        name=model.file.name,
        architecture=f"ONNX ({model.facts.model_type})" if model.facts.raw else "ONNX",
        model_type=model.facts.model_type,
        vocab=model.run.shape(logits)[-1],
        hidden=model.run.shape(table.outputs[0])[-1],
        layers=layers,
        max_positions=model.positions,
        eos_token_ids=model.facts.eos_token_ids,
        bos_token_id=model.facts.bos_token_id,
        config_sha256=config_sha256,
    )
