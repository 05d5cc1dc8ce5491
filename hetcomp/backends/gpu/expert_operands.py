"""The operands of a moe_experts op on a GPU, and the constants that its launches share."""

from __future__ import annotations

from hetcomp.backends.gpu.kernels import NUMBER_TYPES, Constant, GpuRequest, Operand
from hetcomp.backends.gpu.words import ORDERED, matrix_words, word_type
from hetcomp.ir.layouts import has_act_order
from hetcomp.ir.ops import MoeExperts
from hetcomp.ir.types import DType

Argument = tuple[str, Operand] | None


def number_of(weight_format: str) -> DType:
    """What is stored between the products and behind them."""
    return DType.F32 if weight_format == "f32" else DType.BF16


def pointer_to(weight_format: str) -> str:
    """The Triton type of pointers to it."""
    return NUMBER_TYPES[number_of(weight_format)]


class ExpertOperands:
    """``here``: experts among the operands; ``resident``: the argument that says which. ``weight_format`` is that of
    gate and up."""

    def __init__(self, request: GpuRequest) -> None:
        attrs = request.op.attrs
        assert isinstance(attrs, MoeExperts)
        self.attrs = attrs
        self.weight_format, self.down_format = (str(value.format) for value in request.inputs[3:5])
        self.here = int(request.inputs[3].type.shape[0])
        self.resident: Argument = ("*i32", Operand("input", 5 + 2 * attrs.bias)) if request.resident else None
        self.ids = ("*i32", Operand("input", 1))
        self.weights = ("*fp32", Operand("input", 2))
        self.tiles = request.tiles
        self.pairs = request.pairs
        self.up_layout, self.down_layout = (value.type.layout for value in request.inputs[3:5])
        forms = "_".join(dict.fromkeys((self.weight_format, self.down_format)))
        ordered = ORDERED * (has_act_order(self.up_layout) or has_act_order(self.down_layout))
        self.stem = f"experts_{forms}_{self.here}x{attrs.intermediate}x{attrs.hidden}{ordered}"
        self.shape: dict[str, Constant] = {"HIDDEN": attrs.hidden, "INTERMEDIATE": attrs.intermediate}

    def gate_up(self) -> tuple[dict[str, Argument], dict[str, Constant]]:
        """Arguments and constants of the first product."""
        a, word = self.attrs, word_type(self.weight_format)
        arguments: dict[str, Argument] = {
            "w": (word, Operand("input", 3)),
            "bias": ("*fp32", Operand("input", 5)) if a.bias else None,
        }
        constants: dict[str, Constant] = {
            **self.shape,
            "MATRIX": matrix_words(2 * a.intermediate, a.hidden, self.weight_format, self.up_layout),
            "FORMAT": self.weight_format,
        }
        return arguments, constants

    def glu(self) -> dict[str, Constant]:
        """Constants of what stands between them."""
        return {"FUNCTION": self.attrs.function, "ALPHA": self.attrs.alpha, "LIMIT": self.attrs.limit}

    def down(self) -> tuple[dict[str, Argument], dict[str, Constant]]:
        """Of the second."""
        a, word = self.attrs, word_type(self.down_format)
        arguments: dict[str, Argument] = {
            "w": (word, Operand("input", 4)),
            "bias": ("*fp32", Operand("input", 6)) if a.bias else None,
        }
        constants: dict[str, Constant] = {
            **self.shape,
            "MATRIX": matrix_words(a.hidden, a.intermediate, self.down_format, self.down_layout),
            "FORMAT": self.down_format,
        }
        return arguments, constants
