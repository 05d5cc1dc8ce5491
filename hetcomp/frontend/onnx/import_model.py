"""From an .onnx file to what a trace of transformers gives: a torch graph, facts, and a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hetcomp.errors import HetcompError
from hetcomp.frontend.onnx.checkpoint import OnnxCheckpoint
from hetcomp.frontend.onnx.evaluate import Evaluator, Run, kind_of, step_sizes, table_rows
from hetcomp.frontend.onnx.graph import Graph
from hetcomp.frontend.onnx.model_facts import UNKNOWN_POSITIONS, ModelFacts, exported_info, model_facts
from hetcomp.frontend.onnx.model_file import OnnxFile, open_model
from hetcomp.frontend.onnx.parameters import Parameters
from hetcomp.frontend.onnx.recognise_attention import replace_attention
from hetcomp.frontend.onnx.recognise_norm import replace_norms
from hetcomp.frontend.onnx.recognise_rope import replace_ropes
from hetcomp.frontend.onnx.to_fx import ATTENTION, to_fx
from hetcomp.frontend.trace import TracedModel
from hetcomp.ir.plan import ModelInfo

_EMBEDDINGS = ("Gather", "com.microsoft.GatherBlockQuantized")


@dataclass(frozen=True)
class OnnxModel:
    """A file whose graph was read. ``graph`` has attention, norms and rotary embeddings as hetcomp's ops; ``run``: the
    values of the graph as it was. ``unread``: tensors of the file that the logits do not depend on.
    ``exported``: facts and config of a model that hetcomp exported."""

    file: OnnxFile
    facts: ModelFacts
    graph: Graph
    run: Run
    positions: int
    unread: frozenset[str]
    exported: tuple[ModelInfo, dict[str, Any]] | None


def read_model(path: Path) -> OnnxModel:
    """Recognises what ``path`` computes. Raises HetcompError naming a node or tensor that hetcomp cannot compile."""
    file = open_model(path)
    facts = model_facts(path.parent)
    graph = file.graph.replaced({}, file.graph.outputs[:1])
    graph = _with_inputs(graph)
    unread = frozenset(graph.initialisers) - {v for node in graph.nodes for v in node.inputs}
    exported = exported_info(file.metadata, str(path))
    positions = exported[0].max_positions if exported else facts.positions or UNKNOWN_POSITIONS
    evaluator = Evaluator(file)
    run = evaluator.run(graph, *step_sizes(graph))
    positions = min([positions, *table_rows(graph, run)])
    far = evaluator.run(graph, 1, positions - 1 if run.past else 0)
    graph = replace_norms(graph, run)
    graph = replace_attention(graph, run, far, str(path))
    graph = replace_ropes(graph, run, far, str(path))
    return OnnxModel(file, facts, graph, run, positions, unread, exported)


def _with_inputs(graph: Graph) -> Graph:
    used = {v for node in graph.nodes for v in node.inputs}
    return Graph(graph.nodes, {n: i for n, i in graph.inputs.items() if n in used}, graph.outputs, graph.initialisers)


def traced_model(model: OnnxModel, context: int) -> tuple[TracedModel, OnnxCheckpoint]:
    """The torch graph and where its weights are."""
    origin = str(model.file.path)
    ids = [name for name, given in model.graph.inputs.items() if kind_of(given, model.file) == "ids"]
    if len(ids) != 1:
        raise HetcompError(f"{origin} has no input of token ids (input_ids), so it is no language model")
    parameters = Parameters()
    traced = to_fx(model.graph, model.run, parameters, ids[0], context, origin, model.facts.provider)
    return traced, OnnxCheckpoint(model.file, parameters.all, model.unread)


def model_info(model: OnnxModel, config_sha256: str) -> ModelInfo:
    """Facts for the Plan. Raises HetcompError if the graph is no language model with attention."""
    logits = model.graph.outputs[0]
    layers = sum(node.op in ATTENTION for node in model.graph.nodes)
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
