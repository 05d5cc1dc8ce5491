"""Chooses the backend of every op and answers the passes' questions about kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hetcomp.backends import adapted_ops, packing
from hetcomp.backends.cpu import CpuBackend
from hetcomp.backends.gpu.kernels import GpuRequest
from hetcomp.backends.gpu.triton_backend import TritonBackend
from hetcomp.backends.operand_layouts import layouts_for
from hetcomp.backends.protocol import Isa, Kernel, KernelBackend, KernelRequest
from hetcomp.backends.tvm import TvmBackend
from hetcomp.errors import HetcompError
from hetcomp.hardware.tuning import KernelTuning
from hetcomp.ir.cpu_side import CpuRole, cpu_templates
from hetcomp.ir.node_parts import part_id, plan_parts
from hetcomp.ir.ops import MoeExperts
from hetcomp.ir.plan import Op, Plan, Template, Value


def default_backends() -> tuple[KernelBackend, ...]:
    """Hand-written templates for the hot kinds, TVM for the rest."""
    return (CpuBackend(), TvmBackend())


@dataclass(frozen=True)
class CpuTarget:
    """KernelTarget of a CPU program built for one or several instruction sets, with the ``tunings`` of a profile, and
    of what a GPU does beside it."""

    isas: tuple[Isa, ...]
    backends: tuple[KernelBackend, ...]
    tunings: tuple[KernelTuning, ...] = ()

    def workspace_bytes(self, op: Op, template: Template, dims: Mapping[str, int]) -> int:
        """Largest scratch memory over the instruction sets (one plan serves them all)."""
        if op.kind == "transfer":  # a copy, or mapped memory: no kernel
            return 0
        needs = []
        for isa in self.isas:
            ask = request(op, template, isa, dims, self.tunings)
            needs.append(choose(self.backends, ask).workspace_bytes(ask))
        return max(needs)

    def gpu_refusal(self, op: Op, template: Template) -> str | None:
        """Why no GPU code can be generated for the op, one sentence; None if it can."""
        if op.kind == "transfer":
            return None
        values = template.value_map()
        inputs, outputs = tuple(values[i] for i in op.inputs), tuple(values[o] for o in op.outputs)
        return TritonBackend().refusal(GpuRequest(op, inputs, outputs))

    def weight_layout(self, op: Op, operand: int, act_order: bool) -> str:
        """Layout in which input ``operand`` of the op is stored."""
        return layouts_for(op.kind, operand)[-1 if act_order else 0]

    def packed_bytes(self, value: Value) -> int:
        """Bytes of the packed weight, padding included."""
        return packing.packed_bytes(value)

    def pair_bytes(self, value: Value, rank: int) -> int:
        """Bytes of an adapter's pair of that rank for the weight."""
        return sum(adapted_ops.pair_bytes(adapted_ops.shape_of(value), rank))


def request(
    op: Op,
    template: Template,
    isa: Isa,
    dims: Mapping[str, int],
    tunings: tuple[KernelTuning, ...] = (),
    *,
    from_disk: bool = False,
) -> KernelRequest:
    """The kernel request of an op of ``template``. from_disk: the plan reads experts from the disk."""
    values = template.value_map()
    return KernelRequest(
        op=op,
        inputs=tuple(values[i] for i in op.inputs),
        outputs=tuple(values[o] for o in op.outputs),
        isa=isa,
        dims=dict(dims),
        tunings=tunings,
        from_disk=from_disk and isinstance(op.attrs, MoeExperts),
    )


def choose(backends: Sequence[KernelBackend], ask: KernelRequest) -> KernelBackend:
    """The backend with the highest score. Raises HetcompError naming the op if none supports it."""
    best = max(backends, key=lambda backend: backend.score(ask))
    if best.score(ask) <= 0:
        raise HetcompError(
            f"No kernel backend supports the op '{ask.op.kind}' at {ask.op.origin or ask.op.id}; "
            f"tried {', '.join(b.name for b in backends)}."
        )
    return best


def select_kernels(plan: Plan, target: CpuTarget, isa: Isa) -> dict[tuple[str, str], Kernel]:
    """Generates the kernel of every op of the CPU for ``isa``, keyed by (template name, op id); of an op that is cut
    over NUMA nodes one for every part, keyed by (template name, ``part_id`` of the op)."""
    dims, parts, from_disk = plan.max_dims(), plan_parts(plan), plan.disk is not None
    kernels: dict[tuple[str, str], Kernel] = {}
    for side in cpu_templates(plan).values():
        template = side.template
        for op in template.ops:
            if side.roles[op.id] not in (CpuRole.COMPUTE, CpuRole.EXPERTS):
                continue
            cut = parts.get((template.name, op.id), ())
            for part in cut:
                ask = request(*part.of(op, template), isa, dims, target.tunings, from_disk=from_disk)
                kernels[template.name, part_id(op.id, part.node)] = choose(target.backends, ask).emit(ask)
            if not cut:
                ask = request(op, template, isa, dims, target.tunings, from_disk=from_disk)
                kernels[template.name, op.id] = choose(target.backends, ask).emit(ask)
    return kernels
