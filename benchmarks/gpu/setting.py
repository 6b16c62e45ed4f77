"""What one run on a GPU machine measures; plain JSON values, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

TOPOLOGIES: Final = ("windowed", "windowed+dilated", "windowed+pooled")  # of a request to SDXL; most steps first


@dataclass(frozen=True)
class Variant:
    """One way in which the model was compiled: packages that are carried to the machine.

    Attributes:
        name: in records.
        dtype: of the weights: "bfloat16".
        memory_format: of the weights of convolutions: "channels_last" or "contiguous".
        tree: name of the carried sources that compiled it, and that run it; "" for this checkout's.
    """

    name: str
    dtype: str
    memory_format: str
    tree: str = ""


@dataclass(frozen=True)
class Setting:
    """What a run measures.

    Attributes:
        device: "cuda" or "cpu".
        tiny: a tiny model at small sizes: a dry run.
        sizes: (width, height) in pixels, the one to compare at first.
        huge: a size for single steps and for the VAE's memory.
        steps: of a request.
        repeats: timed turns of each contestant.
        variants: those of one tree and dtype are timed in turns against the same eager step.
        carried: folder of `carried.unpack`.
        caches: folder in which each variant gets its compile cache.
    """

    device: str
    tiny: bool
    sizes: tuple[tuple[int, int], ...]
    huge: tuple[int, int]
    steps: int
    repeats: int
    variants: tuple[Variant, ...]
    carried: str
    caches: str

    @property
    def pixels(self) -> list[tuple[int, int]]:
        """(height, width) of each size, as `Handle` takes them."""
        return [(height, width) for width, height in self.sizes]

    @property
    def all_pixels(self) -> list[tuple[int, int]]:
        """The same, with the huge size: packages have to serve all of them."""
        return [*self.pixels, self.huge[::-1]]

    @property
    def trees(self) -> tuple[str, ...]:
        """The other sources that variants are of."""
        return tuple(dict.fromkeys(variant.tree for variant in self.variants if variant.tree))

    def of_tree(self, tree: str) -> Setting:
        """The same with the variants of one tree: what its process measures."""
        return replace(self, variants=tuple(variant for variant in self.variants if variant.tree == tree))

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Of the variants, the main one first."""
        return tuple(dict.fromkeys(variant.dtype for variant in self.variants))

    def of_dtype(self, dtype: str) -> tuple[Variant, ...]:
        """The variants of a dtype."""
        return tuple(variant for variant in self.variants if variant.dtype == dtype)

    def to_json(self) -> dict[str, Any]:
        """A plain JSON mapping."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Setting:
        """Inverse of `to_json`, after a passage through JSON too."""
        sizes = tuple((width, height) for width, height in fields["sizes"])
        variants = tuple(Variant(**variant) for variant in fields["variants"])
        return cls(**{**fields, "sizes": sizes, "huge": tuple(fields["huge"]), "variants": variants})


FULL: Final = Setting("cuda", False, ((2048, 2048), (1024, 1024), (2688, 1536)), (4096, 4096), 30, 12, (), "", "")
TINY: Final = Setting("cpu", True, ((128, 128), (192, 128)), (256, 256), 4, 5, (), "", "")
"""SDXL in full size on a GPU, and a dry run; both without variants yet."""
