"""onnxruntime's ops that stand for a few of ONNX's own, written out as those (docs/ContribOperators.md there), so that
what is recognised in graphs that have them is recognised in graphs that spell them out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hetcomp.errors import HetcompError
from hetcomp.frontend.onnx.graph import Attributes, Graph, Node
from hetcomp.frontend.onnx.not_computable import NotComputable

# What onnxruntime's CPU kernel of GatedDeltaNet adds to a sum of squares, as its results show; nothing says.
_L2_EPSILON = 1e-12
_LAST = 1 << 62  # the end of an axis, however long it is
# Of a LinearAttention that was a GatedDeltaNet, instead of q_num_heads: elements of a head of keys.
KEY_DIM = "head_size_qk"
_SOFTPLUS = ("softplus", "qwen")  # the same, by an older name


def written_out(graph: Graph, origin: str) -> Graph:
    """The graph without ops of _FORMS. Raises HetcompError naming one that computes something else."""
    new: dict[str, list[Node]] = {}
    for node in graph.nodes:
        form = _FORMS.get(node.op)
        if form is not None:
            try:
                new[node.outputs[0]] = form(node, graph).nodes
            except NotComputable as error:
                raise HetcompError(f"{origin}: {node} {error}") from error
    return graph.replaced(new, graph.outputs)


class _Form:
    """The nodes that ``node`` becomes."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.nodes: list[Node] = []

    def add(self, op: str, *inputs: str, to: Sequence[str] = (), **attributes: Any) -> str:  # noqa: ANN401 - as graphs have them
        """A node; its (first) result, which has the names ``to`` if they are given."""
        name = f"{self._node.outputs[0]}:{len(self.nodes)}"
        results = tuple(to) or (name,)
        made = Node(self._node.name, op, inputs, results, Attributes(attributes), self._node.scope)
        self.nodes.append(made)
        return results[0]

    def constant(self, *numbers: float, dtype: type[np.generic] = np.int64) -> str:
        """A vector."""
        return self.add("Constant", value=np.array(numbers, dtype))

    def reshaped(self, x: str, *shape: int, to: Sequence[str] = ()) -> str:
        """``x`` in another shape, as Reshape takes it."""
        return self.add("Reshape", x, self.constant(*shape), to=to)


def _linear_attention_gate(node: Node, graph: Graph) -> _Form:
    a, dt_bias, scale = node.inputs[:3]
    form = _Form(node)
    form.add("Mul", form.add("Softplus", form.add("Add", a, dt_bias)), scale, to=node.outputs[:1])
    if len(node.outputs) > 1 and node.outputs[1]:
        form.add("Sigmoid", node.inputs[3], to=node.outputs[1:2])
    return form


def _gated_rms_norm(node: Node, graph: Graph) -> _Form:
    x, scale, gate = node.inputs
    kind = str(node.get("activation", "silu"))
    if kind not in ("silu", "swish", "sigmoid"):
        raise NotComputable(f"has activation={kind}; hetcomp compiles silu, swish or sigmoid")
    form = _Form(node)
    x, gate = (form.reshaped(v, 0, 0, -1, _shape(graph, scale)[0]) for v in (x, gate))
    normed = form.add("RMSNormalization", x, scale, axis=-1, epsilon=node.get("epsilon", 1e-5))
    gated = form.add("Sigmoid", gate)
    gated = gated if kind == "sigmoid" else form.add("Mul", gate, gated)
    form.reshaped(form.add("Mul", normed, gated), 0, 0, -1, to=node.outputs[:1])
    return form


def _gated_add(node: Node, graph: Graph) -> _Form:
    if node.input(3):
        raise NotComputable("projects its gate itself, which hetcomp does not compile")
    x, y, gate = node.inputs[:3]
    form = _Form(node)
    form.add("Add", x, form.add("Mul", y, gate), to=node.outputs[:1])
    return form


def _rotary_embedding_of_pictures(node: Node, graph: Graph) -> _Form:
    """MRotaryEmbedding, of text: the three positions of a token are its one."""
    form = _Form(node)
    positions = form.add("Gather", node.inputs[1], form.add("Constant", value=np.array(0)), axis=0)
    kept = {k: v for k, v in node.attributes.items() if not k.startswith("mrope_")}
    inputs = node.inputs[0], positions, *node.inputs[2:]
    form.add("com.microsoft.RotaryEmbedding", *inputs, to=node.outputs[:1], **kept)
    return form


def _gated_delta_net(node: Node, graph: Graph) -> _Form:
    """As LinearAttention on normed queries and keys, with the gates before it."""
    if node.input(3) or node.get("state_update_capacity", 0):
        raise NotComputable("takes several sequences in one row, or keeps the states of some tokens")
    state = graph.inputs.get(node.input(6))
    if state is None or len(state.shape) != 4 or not all(isinstance(d, int) for d in state.shape[1:]):
        raise NotComputable("has no state among the inputs of the graph that says how large heads are")
    v_heads, v_dim, k_dim = (int(d) for d in state.shape[1:])
    form = _Form(node)
    q, k, v = _parts(form, node, v_heads * v_dim)
    if node.get("qk_l2_norm", 0):
        q, k = (_l2_normed(form, x, k_dim) for x in (q, k))
    decay, beta = _gates(form, node)
    sizes: dict[str, Any] = {"kv_num_heads": v_heads, KEY_DIM: k_dim}
    sizes |= {name: node.attributes[name] for name in ("update_rule", "scale") if name in node.attributes}
    rows = form.add("com.microsoft.LinearAttention", q, k, v, node.input(6), decay, beta, **sizes)
    form.reshaped(rows, 0, 0, v_heads, v_dim, to=node.outputs[:1])
    return form


def _parts(form: _Form, node: Node, values: int) -> list[str]:
    """Queries, keys and values, a row a token each; ``values``: how many numbers of a row of all three are values."""
    if node.input(1):
        return [form.reshaped(x, 0, 0, -1) for x in node.inputs[:3]]
    names, end = (f"{node.outputs[0]}:q", f"{node.outputs[0]}:k"), form.constant(-values)
    axis = form.constant(-1)
    both = form.add("Slice", node.inputs[0], form.constant(0), end, axis)
    form.add("Split", both, to=names, axis=-1, num_outputs=2)
    return [*names, form.add("Slice", node.inputs[0], end, form.constant(_LAST), axis)]


def _l2_normed(form: _Form, x: str, dim: int) -> str:
    heads = form.reshaped(x, 0, 0, -1, dim)
    squares = form.add("ReduceSum", form.add("Mul", heads, heads), form.constant(-1), keepdims=1)
    total = form.add("Add", squares, form.constant(_L2_EPSILON, dtype=np.float32))
    return form.reshaped(form.add("Div", heads, form.add("Sqrt", total)), 0, 0, -1)


def _gates(form: _Form, node: Node) -> tuple[str, str]:
    """Decay and rate, of what comes before their functions."""
    decay, beta = node.inputs[4:6]
    kind, rate = str(node.get("gate_activation", "none")), str(node.get("beta_activation", "none"))
    if kind not in ("none", *_SOFTPLUS):
        raise NotComputable(f"has gate_activation={kind}; hetcomp compiles none or softplus")
    if kind in _SOFTPLUS:
        biased = form.add("Softplus", form.add("Add", decay, node.inputs[8]))
        decay = form.add("Mul", form.add("Neg", form.add("Exp", node.inputs[7])), biased)
    return decay, form.add("Sigmoid", beta) if rate == "sigmoid" else beta


def _shape(graph: Graph, weight: str) -> tuple[int, ...]:
    if weight not in graph.initialisers:
        raise NotComputable(f"takes {weight} for a weight, which is computed")
    return graph.initialisers[weight].shape


_FORMS: Mapping[str, Callable[[Node, Graph], _Form]] = {
    "com.microsoft.GatedAdd": _gated_add,
    "com.microsoft.GatedDeltaNet": _gated_delta_net,
    "com.microsoft.GatedRMSNorm": _gated_rms_norm,
    "com.microsoft.LinearAttentionGate": _linear_attention_gate,
    "com.microsoft.MRotaryEmbedding": _rotary_embedding_of_pictures,
}
