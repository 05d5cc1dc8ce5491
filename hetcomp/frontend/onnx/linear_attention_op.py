"""LinearAttention and CausalConvWithState, of ONNX's opset 27 and of onnxruntime: what hetcomp takes of them, and the
shapes of what they make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from hetcomp.frontend.onnx.graph import Graph, Node
from hetcomp.frontend.onnx.not_computable import NotComputable
from hetcomp.frontend.onnx.written_out import KEY_DIM

Maybe = Tensor | None
_ONNX, _MICROSOFT = "", "com.microsoft."
LINEAR_ATTENTION = frozenset(f"{domain}LinearAttention" for domain in (_ONNX, _MICROSOFT))
CAUSAL_CONV = frozenset(f"{domain}CausalConvWithState" for domain in (_ONNX, _MICROSOFT))
# Which operand is the state, of the ops that have one.
_STATES = dict.fromkeys((*LINEAR_ATTENTION, *CAUSAL_CONV), 3) | {"com.microsoft.GatedDeltaNet": 6}
_SAME = frozenset({"Cast", "Identity"})


@dataclass(frozen=True)
class Heads:
    """Numbers of heads of queries and keys, and of values; elements of one of each."""

    k_heads: int
    v_heads: int
    k_dim: int
    v_dim: int


def heads_of(node: Node, q: Iterable[int], k: Iterable[int], v: Iterable[int]) -> Heads:
    """Of a LinearAttention with operands of these shapes. Raises NotComputable if hetcomp does not compile it."""
    rule, window = str(node.get("update_rule", "gated_delta")), node.get("state_window", 0)
    if rule != "gated_delta":
        raise NotComputable(f"has update_rule={rule}; hetcomp compiles gated_delta")
    if window:
        raise NotComputable(f"has state_window={window}; hetcomp compiles 0, the state behind the last token alone")
    rows_q, rows_k, rows_v = (list(shape)[-1] for shape in (q, k, v))
    v_heads = int(node.attributes["kv_num_heads"])
    dim = int(node.get(KEY_DIM, 0))
    k_heads = rows_q // dim if dim else int(node.attributes["q_num_heads"])
    if k_heads < 1 or v_heads < 1 or rows_q % k_heads or rows_v % v_heads or rows_k % (rows_q // k_heads):
        raise NotComputable(f"has rows of {rows_q}, {rows_k} and {rows_v} for {k_heads} and {v_heads} heads")
    if v_heads % k_heads or rows_k != rows_q:
        raise NotComputable(
            f"has {k_heads} heads of queries, {rows_k * k_heads // rows_q} of keys and {v_heads} of values; hetcomp "
            "compiles as many of queries as of keys, and a multiple of them of values"
        )
    return Heads(k_heads, v_heads, rows_q // k_heads, rows_v // v_heads)


def linear_attention_shapes(node: Node, q: Tensor, k: Tensor, v: Tensor, *rest: Maybe) -> tuple[Maybe, ...]:
    """Rows of values [B, T, heads * v_dim]; the state behind them as there was one before."""
    heads = heads_of(node, q.shape, k.shape, v.shape)
    state = q.new_empty((q.shape[0], heads.v_heads, heads.k_dim, heads.v_dim), device="meta")
    return q.new_empty((*q.shape[:2], heads.v_heads * heads.v_dim), device="meta"), state


def causal_conv_shapes(node: Node, x: Tensor, weight: Tensor, *rest: Maybe) -> tuple[Maybe, ...]:
    """As x; the state behind it."""
    expected = {"ndim": 1, "dilation": 1, "state_window": 0, "state_length": 0, "input_channels": 0}
    expected |= {"state_update_capacity": 0, "input_channel_offset": 0}
    for name, value in expected.items():
        if node.get(name, value) != value:
            raise NotComputable(f"has {name}={node.attributes[name]}; hetcomp compiles {value}")
    if x.ndim != 3:
        raise NotComputable(f"has an input of shape {list(x.shape)}; expected three axes")
    channels, width = weight.shape[0], weight.shape[2]
    return x.new_empty(x.shape, device="meta"), x.new_empty((x.shape[0], channels, width - 1), device="meta")


def is_state(graph: Graph, name: str) -> bool:
    """Whether nothing reads the input ``name`` but as the state of a convolution or of linear attention."""
    names, found = {name}, False
    for node in graph.nodes:
        if not names.intersection(node.inputs):
            continue
        if node.op in _SAME:
            names.add(node.outputs[0])
        elif [i for i, v in enumerate(node.inputs) if v in names] == [_STATES.get(node.op, -1)]:
            found = True
        else:
            return False
    return found


def check_state(given: str, graph: Graph, producers: Mapping[str, Node], values: Mapping[str, Tensor]) -> None:
    """Raises NotComputable unless the state that an op begins with is an input, or zero."""
    while given in producers and producers[given].op in _SAME:
        given = producers[given].inputs[0]
    known = values.get(given)
    if given and given not in graph.inputs and (known is None or known.is_meta or bool(known.any())):
        raise NotComputable(f"begins with the state {given}, which is neither an input of the graph nor zero")
