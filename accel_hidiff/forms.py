"""The form that an operator is traced in: the same numbers by other steps, where a device is faster at them.

torch decomposes each operator in one way for all devices. These are other ways, for graphs that are compiled for a GPU
and hold their images in channels_last: sums are taken along the axis that lies in memory, and nothing is transposed.
What they give differs from torch's by rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.overrides import TorchFunctionMode


def group_norm(
    image: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """`torch.nn.functional.group_norm` of a (B, C, ...) image whose channels lie beside each other, as the result's do.

    Mean and variance of each channel come first, in one pass along memory, then those of a group of channels of equal
    counts: its variance is the mean of theirs plus the variance of their means. In float32, as torch's own.
    """
    batch, channels = image.shape[:2]
    tokens = image.flatten(2).transpose(1, 2).float()
    variance, mean = torch.var_mean(tokens, dim=1, correction=0)
    groups = batch, num_groups, channels // num_groups
    between, center = torch.var_mean(mean.view(groups), dim=2, correction=0, keepdim=True)
    deviation = torch.rsqrt(variance.view(groups).mean(2, keepdim=True) + between + eps)
    scale, center = (of_group.expand(groups).reshape(batch, 1, channels) for of_group in (deviation, center))
    if weight is not None:
        scale = scale * weight.float()
    shift = -center * scale if bias is None else bias.float() - center * scale
    return (tokens * scale + shift).to(image.dtype).transpose(1, 2).view(image.shape)


_CHANNELS_LAST: Final[Mapping[Any, Callable[..., Tensor]]] = {F.group_norm: group_norm}


class TracedInForms(TorchFunctionMode):
    """Calls of these functions of torch run these others, inside of the block.

    Args:
        forms: function of torch -> what takes its place for images, (B, C, ...).
    """

    def __init__(self, forms: Mapping[Any, Callable[..., Tensor]]) -> None:
        super().__init__()
        self._forms = forms

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        form = self._forms.get(func)
        chosen = func if form is None or args[0].ndim < 3 else form
        return chosen(*args, **(kwargs or {}))


def forms_of(device: torch.device, memory_format: torch.memory_format) -> TracedInForms:
    """What a region is traced in, on a device, whose images have this memory format."""
    takes = device.type == "cuda" and memory_format == torch.channels_last
    return TracedInForms(_CHANNELS_LAST if takes else {})


def end_detours(program: torch.export.ExportedProgram) -> None:
    """Where views of a tensor come back to what it was, whoever reads the last one reads the tensor.

    An image that lies in memory as tokens is turned to (B, C, h, w) and back between two modules. Inductor does not see
    through that where sizes are symbolic, and copies.
    """
    graph = program.graph
    aliases = program.graph_signature.user_outputs
    for node in list(graph.nodes):
        if node.name in aliases or not _is_view(node):
            continue
        source = node.args[0]
        while _is_view(source) and not _same_view(source, node):
            source = source.args[0]
        if source is not node.args[0] and isinstance(source.meta.get("val"), Tensor) and _same_view(source, node):
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    program.graph_module.recompile()


_VIEWS: Final = ("aten.view", "aten.reshape", "aten.flatten", "aten.permute", "aten.transpose")


def _is_view(node: torch.fx.Node) -> bool:
    """Whether a node's result lies where its first input does."""
    if node.op != "call_function" or not str(node.target).startswith(_VIEWS):
        return False
    inner, outer = (one.meta["val"].untyped_storage()._cdata for one in (node, node.args[0]))  # type: ignore[union-attr]
    return inner == outer


def _same_view(one: torch.fx.Node, other: torch.fx.Node) -> bool:
    """Whether two views of one tensor are the same numbers in the same order."""
    first, second = one.meta["val"], other.meta["val"]
    if first.ndim != second.ndim:
        return False
    numbers = zip((*first.shape, *first.stride()), (*second.shape, *second.stride()), strict=True)
    return all(statically_known_true(left == right) for left, right in numbers)  # no guard on a symbolic size
