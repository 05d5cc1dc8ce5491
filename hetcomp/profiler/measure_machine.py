"""The whole profile of this machine: bandwidths, our kernels' curves, disk, GPUs."""

from __future__ import annotations

from collections.abc import Callable

from hetcomp.backends.protocol import Isa
from hetcomp.hardware.detect import detect_machine
from hetcomp.hardware.figures import KernelCurve
from hetcomp.hardware.gpus import detect_gpus
from hetcomp.hardware.measure import cache_file, lanes, measure
from hetcomp.hardware.profile import HardwareProfile
from hetcomp.profiler.disk import measure_disk
from hetcomp.profiler.kernel_curves import kernel_curves

Progress = Callable[[str], None]


def measure_machine(*, quick: bool = False, progress: Progress | None = None) -> HardwareProfile:
    """Measures this machine: about a minute and a half on two cores, with ``quick`` (bandwidths and a few points of
    the best instruction set's kernels, no disk) less than 15 s.

    Raises HetcompError if there is no compiler, or a probe fails.
    """
    say = progress or (lambda _: None)
    machine = detect_machine()
    say("read bandwidth, caches, barrier")
    profile = measure(machine)
    if not profile.measured:
        return profile
    curves: list[KernelCurve] = []
    isas = [isa for isa in Isa if isa.value in machine.isas]
    _, cpus = lanes(machine)[0]
    for isa in isas[-1:] if quick else isas:
        best = isa is isas[-1]
        curves += kernel_curves(
            isa, cpus, profile.barrier_us, coarse=quick or not best, tail=best and not quick, progress=say
        )
    say("disk, GPUs")
    return profile.model_copy(
        update={
            "curves": tuple(curves),
            "disk": None if quick else measure_disk(cache_file(machine).parent),
            "gpus": detect_gpus().gpus,
        }
    )
