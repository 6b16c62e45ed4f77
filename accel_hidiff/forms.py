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
from torch.overrides import TorchFunctionMode


def group_norm(
    image: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """`torch.nn.functional.group_norm` of (B, C, h, w) images in channels_last, whose result is so, too.

    Mean and variance of each channel come first, in one pass along memory, then those of a group of channels of equal
    counts: its variance is the mean of theirs plus the variance of their means. In float32, as torch's own.
    """
    batch, channels, height, width = image.shape
    tokens = image.permute(0, 2, 3, 1).reshape(batch, height * width, channels).float()
    variance, mean = torch.var_mean(tokens, dim=1, correction=0)
    groups = batch, num_groups, channels // num_groups
    between, center = torch.var_mean(mean.view(groups), dim=2, correction=0, keepdim=True)
    deviation = torch.rsqrt(variance.view(groups).mean(2, keepdim=True) + between + eps)
    scale, center = (of_group.expand(groups).reshape(batch, 1, channels) for of_group in (deviation, center))
    if weight is not None:
        scale = scale * weight.float()
    shift = -center * scale if bias is None else bias.float() - center * scale
    out = (tokens * scale + shift).to(image.dtype)
    return out.view(batch, height, width, channels).permute(0, 3, 1, 2)


_FUSED_UP_TO: Final = 256  # channels of a head: the widest that flash attention takes
_CHUNKS: Final = 16


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`; that of one wide head, of a VAE, by matrix products.

    No fused kernel is good at a head of 512: the one that takes it reaches a fifth of what products reach. The queries
    are cut into parts, so that a sixteenth of the scores is in memory at once. Softmax in float32.
    """
    width = query.shape[-1]
    plain = attn_mask is None and not dropout_p and not is_causal and not enable_gqa
    if not plain or width <= _FUSED_UP_TO or query.shape[1] != 1 or query.dtype == torch.float32:
        options = attn_mask, dropout_p, is_causal
        return F.scaled_dot_product_attention(query, key, value, *options, scale=scale, enable_gqa=enable_gqa)
    query, key, value = (heads[:, 0] for heads in (query, key, value))
    tokens = query.shape[1]
    part = (tokens + _CHUNKS - 1) // _CHUNKS
    query = F.pad(query * (width**-0.5 if scale is None else scale), (0, 0, 0, _CHUNKS * part - tokens))
    outs = []
    for number in range(_CHUNKS):
        scores = torch.bmm(query[:, number * part : (number + 1) * part], key.transpose(1, 2))
        outs.append(torch.bmm(torch.softmax(scores.float(), -1).to(value.dtype), value))
    return torch.cat(outs, 1)[:, None, :tokens]


_CHANNELS_LAST: Final[Mapping[Any, Callable[..., Tensor]]] = {
    F.group_norm: group_norm,
    F.scaled_dot_product_attention: attention,
}


class TracedInForms(TorchFunctionMode):
    """Calls of these functions of torch run these others, inside of the block.

    Args:
        forms: function of torch -> what takes its place for images, (B, C, h, w).
    """

    def __init__(self, forms: Mapping[Any, Callable[..., Tensor]]) -> None:
        super().__init__()
        self._forms = forms

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        form = self._forms.get(func)
        chosen = func if form is None or args[0].ndim != 4 else form
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


_VIEWS: Final = ("aten.view", "aten.reshape", "aten.permute", "aten.transpose")


def _is_view(node: torch.fx.Node) -> bool:
    """Whether a node's result lies where its first input does."""
    if node.op != "call_function" or not str(node.target).startswith(_VIEWS):
        return False
    inner, outer = (one.meta["val"].untyped_storage()._cdata for one in (node, node.args[0]))  # type: ignore[union-attr]
    return inner == outer


def _same_view(one: torch.fx.Node, other: torch.fx.Node) -> bool:
    """Whether two views of one tensor are the same numbers in the same order."""
    first, second = one.meta["val"], other.meta["val"]
    return first.shape == second.shape and first.stride() == second.stride()
