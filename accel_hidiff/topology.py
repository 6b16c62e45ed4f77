"""Topology: the hashable name of one static graph of a HiDiffusion UNet. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Topology:
    """Which parts of HiDiffusion are on in one UNet call.

    `windowed`: MSW-MSA, self-attention in 2x2 shifted windows (paper section 3.3). `pooled` and `dilated`: the two
    places of RAU-Net (section 3.2), a 2x2 average pool undone by a bicubic resize, and a stride-4 dilated downsampler.
    """

    windowed: bool = False
    pooled: bool = False
    dilated: bool = False

    def __str__(self) -> str:
        on = [name for name in ("windowed", "pooled", "dilated") if getattr(self, name)]
        return "+".join(on) or "plain"

    @classmethod
    def parse(cls, text: str) -> Topology:
        """Inverse of `str`.

        >>> Topology.parse("windowed+pooled")
        Topology(windowed=True, pooled=True, dilated=False)
        """
        names = [] if text == "plain" else text.split("+")
        unknown = set(names) - {"windowed", "pooled", "dilated"}
        if unknown:
            raise ValueError(f"expected parts among windowed, pooled, dilated; got {', '.join(sorted(unknown))}")
        return cls(**dict.fromkeys(names, True))


PLAIN = Topology()
