"""How AOTInductor compiles a graph for a GPU: options that a graph's own facts decide, and choices that are no options.

Nothing here is a fact of one device: the same graph is compiled in the same way with a GPU and without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch

from accel_hidiff.regions import RegionGraph

Options = Mapping[str, bool | int | str]

# Numbers of a row that one block of threads holds: the widest layer norm of SDXL has 1280. Inductor's own limit is
# 1024; a longer row is read twice.
ROW: Final = 2048
# Inductor writes a sum of so many tensors to memory where it is read again. Its own limit, 4, has each layer norm of a
# deep transformer add up to four residuals anew.
_SUMMANDS: Final = 2


def options_of(graph: RegionGraph) -> Options:
    """Options of Inductor for a graph, for one compilation."""
    return {
        "aot_inductor.embed_kernel_binary": True,  # else each kernel is a file, unpacked and read at its first call
        # Without it, convolutions of symbolic sizes are laid out by a rule of thumb.
        "force_layout_optimization": graph.region.memory_format == torch.channels_last,
        # The graph is chosen by whether all of its indices fit (`RegionGraph.wide`); ranges alone cannot tell, since
        # the largest batch never comes with the largest sides.
        "assume_32bit_indexing": not graph.wide,
        **({"realize_reads_threshold": _SUMMANDS} if graph.region.kind == "transformer" else {}),
    }


@contextmanager
def rows_at_once() -> Iterator[None]:
    """Reductions along rows of up to `ROW` numbers read each row once, inside of the block."""
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    class Choices(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            length = features.reduction_numel
            along = features.get_reduction_hint() == ReductionHint.INNER
            if along and not cooperative_reduction and length.is_number and int(length) <= ROW:
                return True
            return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)

    with V.set_choices_handler(Choices()):
        yield
