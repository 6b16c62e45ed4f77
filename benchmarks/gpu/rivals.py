"""The peer that a user would pick where compiling at start is no matter: diffusers' own regional compilation."""

from __future__ import annotations

import accel_hidiff as ah
from accel_hidiff.benching.compilations import compilations, watch
from benchmarks import harness as h
from benchmarks.gpu.journal import Case, Figures
from benchmarks.gpu.lab import Lab, ratio, timing_fields
from benchmarks.gpu.measures import EAGER
from benchmarks.gpu.model import compare
from benchmarks.gpu.setting import TOPOLOGIES


def measure_repeated(lab: Lab, case: Case, figures: Figures) -> None:
    """diffusers' `compile_repeated_blocks` on the patched UNet, with Dynamo's own limits, in turns with eager.

    Past its limit of recompilations Dynamo runs a block eager: `gave_up` counts those.

    Raises:
        WrongOutput: its output is not eager's.
    """
    watch()
    size, dtype = h.Size.parse(case["size"]), case["dtype"]
    patch = ah.apply_hidiffusion(lab.another(dtype))
    patch.unet.compile_repeated_blocks(fullgraph=False, dynamic=False)
    run = lab.call_of(patch, dtype, size, TOPOLOGIES[0])
    eager = lab.call_of(lab.eager(dtype), dtype, size, TOPOLOGIES[0])
    figures["first_s"] = h.rounded(h.timed(run)[0])
    figures |= compare("repeated", run(), eager())
    times = lab.interleave({EAGER: eager, "repeated": run})
    figures |= timing_fields(times) | ratio(times, "repeated", EAGER)
    made = compilations()
    figures |= {"dynamo_graphs": made.graphs, "graph_breaks": made.graph_breaks, "gave_up": made.gave_up}
