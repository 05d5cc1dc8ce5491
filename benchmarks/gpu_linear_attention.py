"""Times the GPU's causal_conv and gated_delta at Qwen3-Next's shape, and holds them against float64: steps of decoding,
prompts, and a batch too large for an exact graph.

    python -m benchmarks.gpu_linear_attention FOLDER
    python3 FOLDER/gpu_linear_attention.py FOLDER > RESULT

As benchmarks.gpu_launches: the first writes a folder, on any machine, with all candidates of each launch; the second
needs a GPU of compute capability 9.0, the driver, PyTorch and nothing of hetcomp. It prints the microseconds of each
launch and its registers (a CUDA graph; states in copies that the cache does not hold), and how far result and states
are from the definition in float64: the root of the mean square, and the largest difference, of the largest number.
"""

from __future__ import annotations

import json
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_K_HEADS, _V_HEADS, _DIM, _CHANNELS, _WIDTH = 16, 32, 128, 8192, 4
_EPS, _CC = 1e-6, 90
# Runs of rows of one slot: slot, first position, rows.
_STEPS: dict[str, tuple[bool, list[tuple[int, int, int]]]] = {
    **{f"decode {n}": (True, [(i, 700, 1) for i in range(n)]) for n in (1, 4, 16)},
    "prompt of 4": (True, [(2, 0, 4)]),
    "batch of 40": (False, [(i, 700, 1) for i in range(40)]),
    **{f"prompt {n}": (False, [(1, 0, n)]) for n in (512, 2048, 4096)},
    "prompt 500 behind others": (False, [(1, 512, 500)]),
}
_SLOTS = 40
_COPIES = 40  # of states: 84 MB, more than the L2 cache of an H100
_Json = dict[str, Any]
_Torch = Any  # the module and its tensors; it is not installed here


# The second machine's half: no hetcomp.


class Reference:
    """Operands of a step on the GPU, and the definitions in float64."""

    def __init__(self, torch: _Torch, runs: list[list[int]]) -> None:
        self.torch, self.runs = torch, runs
        self.rows = sum(rows for _, _, rows in runs)
        random = torch.Generator("cuda").manual_seed(1)

        def normal(*shape: int) -> _Torch:
            return torch.randn(*shape, device="cuda", generator=random)

        slots = [slot for slot, _, rows in runs for _ in range(rows)]
        positions = [first + i for _, first, rows in runs for i in range(rows)]
        self.buffers = {
            "x": normal(self.rows, _CHANNELS),
            "weight": normal(_CHANNELS, _WIDTH) * 0.5,
            "conv_state": normal(_SLOTS + 1, _WIDTH - 1, _CHANNELS),
            "qkv": normal(self.rows, _CHANNELS),
            "a": normal(self.rows, _V_HEADS),
            "b": normal(self.rows, _V_HEADS) * 2,
            "a_log": (torch.rand(_V_HEADS, device="cuda", generator=random) * 16).clamp(0.01).log(),
            "dt_bias": normal(_V_HEADS) - 2,
            "delta_state": normal(_SLOTS + 1, _V_HEADS, _DIM, _DIM),
            "slots": torch.tensor(slots, dtype=torch.int32, device="cuda"),
            "positions": torch.tensor(positions, dtype=torch.int32, device="cuda"),
            "rows": torch.tensor([self.rows], dtype=torch.int32, device="cuda"),
        }

    def causal_conv(self) -> tuple[_Torch, _Torch]:
        torch, given = self.torch, {k: v.double() for k, v in self.buffers.items()}
        states, parts, t = given["conv_state"].clone(), [], 0
        for slot, first, rows in self.runs:
            before = states[slot] if first > 0 else torch.zeros_like(states[slot])
            there = torch.cat([before, given["x"][t : t + rows]])
            sums = sum(there[j : j + rows] * given["weight"][:, j] for j in range(_WIDTH))
            parts.append(sums * torch.sigmoid(sums))
            states[slot] = there[rows:]
            t += rows
        return torch.cat(parts), states

    def gated_delta(self) -> tuple[_Torch, _Torch]:
        torch, given = self.torch, {k: v.double() for k, v in self.buffers.items()}
        q, k, v = given["qkv"].split([_K_HEADS * _DIM, _K_HEADS * _DIM, _V_HEADS * _DIM], dim=1)
        q, k, v = (x.reshape(self.rows, -1, _DIM) for x in (q, k, v))
        q, k = (x / ((x * x).sum(-1, keepdim=True) + _EPS).sqrt() for x in (q, k))
        q, k = (x.repeat_interleave(_V_HEADS // _K_HEADS, dim=1) for x in (q * _DIM**-0.5, k))
        softplus = torch.nn.functional.softplus(given["a"] + given["dt_bias"], threshold=99)
        decay = torch.exp(-given["a_log"].exp() * softplus)
        beta, states, out, t = given["b"].sigmoid(), given["delta_state"].clone(), torch.zeros_like(v), 0
        for slot, first, rows in self.runs:
            s = states[slot] if first > 0 else torch.zeros_like(states[slot])
            for row in range(t, t + rows):
                s = s * decay[row, :, None, None]
                new = beta[row, :, None] * (v[row] - torch.einsum("hk,hkv->hv", k[row], s))
                s = s + k[row, :, :, None] * new[:, None, :]
                out[row] = torch.einsum("hk,hkv->hv", q[row], s)
            states[slot] = s
            t += rows
        return out.reshape(self.rows, -1), states


def _difference(got: _Torch, want: _Torch) -> str:
    apart = (got.double() - want).flatten()
    return f"{(apart.norm() / want.norm()).item():.1e} {(apart.abs().max() / want.abs().max()).item():.1e}"


def _measure_case(device: _Torch, case: _Json, reference: Reference, wanted: tuple[_Torch, _Torch]) -> None:
    torch = device.torch
    state = case["state"]
    y = torch.full((reference.rows, case["width"]), float("nan"), device="cuda")
    workspace = torch.full((max(case["workspace"], 1),), 255, dtype=torch.uint8, device="cuda")
    buffers = {**reference.buffers, "y": y, "workspace": workspace, state: reference.buffers[state].clone()}
    loaded = [device.load(launch["made"]) for launch in case["launches"]]
    for (function, _), launch in zip(loaded, case["launches"], strict=True):
        device.launch(function, launch, buffers)
    torch.cuda.synchronize()
    label = f"{case['name']:36} variant {case['variant']}"
    errors = f"y {_difference(y, wanted[0])}, state {_difference(buffers[state], wanted[1])}"
    slots = len(set(reference.buffers["slots"].tolist()))
    copies = [{**buffers, state: reference.buffers[state].clone()} for _ in range(_COPIES // slots)]
    functions = [function for function, _ in loaded]
    whole = device.microseconds(functions, case["launches"], copies, _COPIES)
    parts = []
    for (function, facts), launch in zip(loaded, case["launches"], strict=True):
        alone = device.microseconds([function], [launch], copies, _COPIES) if len(loaded) > 1 else whole
        parts.append(f"{launch['function']} [{launch['tile']}] {alone:.1f} ({facts})")
    print(f"{label} {whole:8.1f} us, off {errors}: {', '.join(parts)}")


def measure(folder: Path) -> None:
    """The second machine's half."""
    cases = json.loads((folder / "cases.json").read_text())
    device = import_module("gpu_launches").Device()
    for name, (_, runs) in _STEPS.items():
        reference = Reference(device.torch, [list(run) for run in runs])
        wanted = {kind: getattr(reference, kind)() for kind in ("causal_conv", "gated_delta")}
        for case in (case for case in cases if case["step"] == name):
            for launch in case["launches"]:
                launch["made"]["cubin"] = (folder / launch["made"]["cubin"]).read_bytes()
            _measure_case(device, case, reference, wanted[case["kind"]])
            sys.stdout.flush()


# The first machine's half.


def describe(folder: Path) -> None:
    """Writes cases.json, cubins, and what the second half needs of this one."""
    from hetcomp.backends.gpu.compile_kernels import compile_kernels
    from hetcomp.backends.gpu.kernels import GpuRequest, Operand
    from hetcomp.backends.gpu.tile_choices import TileChoices
    from hetcomp.backends.gpu.triton_backend import TritonBackend
    from hetcomp.ir import ops
    from hetcomp.ir.plan import Op, Value, ValueKind
    from hetcomp.ir.types import DType, TensorType

    def value(name: str, *shape: int | str) -> Value:
        kind = ValueKind.STATE if "slots" in shape else ValueKind.ACT
        return Value(name, TensorType(DType.F32, shape), kind)

    conv = ops.CausalConv(_CHANNELS, _WIDTH)
    delta = ops.GatedDelta(_K_HEADS, _V_HEADS, _DIM, _DIM, _DIM**-0.5, _EPS)
    conv_inputs = value("x", "T", _CHANNELS), value("weight", _CHANNELS, 1, _WIDTH)
    conv_inputs += (value("conv_state", "slots", _WIDTH - 1, _CHANNELS),)
    delta_inputs = value("qkv", "T", _CHANNELS), value("a", "T", _V_HEADS), value("b", "T", _V_HEADS)
    delta_inputs += value("a_log", _V_HEADS), value("dt_bias", _V_HEADS)
    delta_inputs += (value("delta_state", "slots", _V_HEADS, _DIM, _DIM),)
    kernels, cases = {}, []
    for name, (exact, runs) in _STEPS.items():
        rows = sum(count for _, _, count in runs)
        bound = rows if exact else (64 if rows <= 64 else 4096)
        for attrs, inputs in ((conv, conv_inputs), (delta, delta_inputs)):
            width = _CHANNELS if attrs is conv else _V_HEADS * _DIM
            seen = []
            for variant in range(4):
                tiles = TileChoices(others=variant)
                outputs = (value("y", "T", width),)
                asked = GpuRequest(
                    Op("op", attrs, (), ()), inputs, outputs, {"T": bound}, rows if exact else None, tiles=tiles
                )
                code = TritonBackend().emit(asked)
                if code in seen:
                    continue
                seen.append(code)

                def argument(operand: Operand, inputs: tuple[Value, ...] = inputs) -> _Json:
                    its = {
                        "input": lambda: inputs[operand.index].id,
                        "output": lambda: "y",
                        "step": lambda: operand.name,
                    }
                    return {"buffer": its.get(operand.source, lambda: "workspace")(), "offset": operand.offset}

                launches = []
                for launch in code.launches:
                    kernels[launch.kernel.name] = launch.kernel
                    launches.append(
                        {
                            "kernel": launch.kernel.name,
                            "function": launch.kernel.function,
                            "tile": launch.tile.chosen if launch.tile else 0,
                            "grid": [axis.programs(bound) for axis in launch.grid],
                            "arguments": [argument(operand) for operand in launch.operands],
                        }
                    )
                state = "conv_state" if attrs is conv else "delta_state"
                case = {
                    "name": f"{attrs.kind}, {name}",
                    "step": name,
                    "kind": attrs.kind,
                    "variant": variant,
                    "width": width,
                }
                cases.append({**case, "state": state, "workspace": code.workspace_bytes, "launches": launches})
    folder.mkdir(parents=True, exist_ok=True)
    made = {m.kernel.name: m for m in compile_kernels(kernels.values(), (_CC,), threads=2)}
    for launch in (launch for case in cases for launch in case["launches"]):
        its = made[launch.pop("kernel")]
        shutil.copyfile(its.cubin, folder / its.cubin.name)
        facts = {"entry": its.entry, "threads": 32 * its.num_warps, "shared": its.shared_bytes}
        launch["made"] = {**facts, "cubin": its.cubin.name}
    (folder / "cases.json").write_text(json.dumps(cases))
    for file in ("gpu_linear_attention.py", "gpu_launches.py"):
        shutil.copyfile(_HERE / file, folder / file)


if __name__ == "__main__":
    (measure if (_HERE / "cases.json").exists() else describe)(Path(sys.argv[1]).resolve())
