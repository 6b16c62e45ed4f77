"""The contestants of a bench by name: this project's backends and their variants, and what others offer. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from accel_hidiff.errors import BadInput

REFERENCE: Final = "eager"
BENCHED: Final = (REFERENCE, "inductor", "aot", "onediff")
STOCK: Final = "stock"  # diffusers as it is: another function than the rest, so that it is compared with nothing
PEERS: Final = {
    STOCK: "diffusers alone: no HiDiffusion, nothing compiled",
    "torch-compile": "torch.compile over the whole patched UNet; /exact: with dynamic=False",
    "repeated-blocks": "diffusers' compile_repeated_blocks on the patched UNet",
    "tensorrt": "torch.compile with the backend of Torch-TensorRT over the whole patched UNet",
    "hidiffusion": "the authors' own package, eager",
    "hidiffusion-compile": "torch.compile over the authors' own package",
}
_REGIONS: Final = ("blocks", "whole")
_SHAPES: Final = ("symbolic", "exact")


@dataclass(frozen=True)
class Contender:
    """A name taken apart.

    Attributes:
        name: as it was asked for.
        base: a backend of this project or a peer.
        regions, shapes: of a variant, as in `accelerate`; None: the bench's own. "torch-compile" has "exact" alone.
    """

    name: str
    base: str
    regions: str | None = None
    shapes: str | None = None

    @property
    def ours(self) -> bool:
        """Whether it is a backend of this project."""
        return self.base in BENCHED

    @classmethod
    def parse(cls, name: str) -> Contender:
        """A backend or peer, with what a variant of it changes behind slashes.

        >>> Contender.parse("aot/whole/exact")
        Contender(name='aot/whole/exact', base='aot', regions='whole', shapes='exact')

        Raises:
            BadInput: there is no such contestant.
        """
        base, *variant = name.split("/")
        regions = next((word for word in variant if word in _REGIONS), None)
        shapes = next((word for word in variant if word in _SHAPES), None)
        known = base in BENCHED[1:] or (base in (REFERENCE, *PEERS) and not variant) or name == "torch-compile/exact"
        if not known or len(variant) != (regions is not None) + (shapes is not None):
            raise BadInput(
                f"--backends: expected names among {','.join((*BENCHED, *PEERS))}, with commas between them, or "
                f"variants such as aot/whole or aot/exact, got {name!r}"
            )
        return cls(name, base, regions, shapes)
