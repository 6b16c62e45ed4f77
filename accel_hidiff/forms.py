"""The form that an operator is traced in: the same numbers by other steps, where a device is faster at them.

torch decomposes each operator in one way for all devices. These are other ways, for graphs that are compiled for a GPU
and hold their images in channels_last: sums are taken along the axis that lies in memory, and nothing is transposed;
attention of a head that no fused kernel is fast at is products. What they give differs from torch's by rounding alone.
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


_HALF: Final = (torch.float16, torch.bfloat16)
# Heads wider than this have no fast kernel of attention: torch's own reaches a fifth of what products reach on them.
_FAST_HEAD: Final = 256
# Queries go in so many parts, each of whose scores are in memory for a while: at 2048x2048, of 65536 tokens, 1.07 GB.
# Parts of fewer rows would leave multiprocessors of a GPU idle in the second product.
_PARTS: Final = 16
# With more (4096x4096) a part's scores would fill more memory than all else.
_MOST_TOKENS: Final = 512 * 512


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
    """`torch.nn.functional.scaled_dot_product_attention`; of one image and one wide head of half numbers in parts."""
    plain = attn_mask is None and not dropout_p and not is_causal and not enable_gqa
    if plain and query.dtype in _HALF and _is_one_head(query) and in_parts(query.shape[-1], query.shape[2]):
        return attention_in_parts(query, key, value, scale)
    options = attn_mask, dropout_p, is_causal
    return F.scaled_dot_product_attention(query, key, value, *options, scale=scale, enable_gqa=enable_gqa)


def attention_in_parts(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Attention of (1, 1, N, D) tensors: for each part of the queries two products, and a softmax between.

    As exact as flash attention, and rounded where that rounds (T. Dao et al., arXiv 2205.14135): scores and all sums
    are float32, what multiplies the values is at most 1 and rounded once, and its sum divides the result.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    queries, keys, values = (tensor.reshape(tensor.shape[-2:]) for tensor in (query, key, value))
    outs = []
    for part in torch.split(queries, rows_of_parts(queries.shape[0])):
        scores = _product(part, keys.t()) * factor
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        summed = _product(weights.to(value.dtype), values)
        outs.append((summed / weights.sum(-1, keepdim=True)).to(value.dtype))
    return torch.cat(outs)[None, None]


def in_parts(head_width: int, tokens: int) -> bool:
    """Whether a GPU's graph of half numbers has the attention of one head in parts; `tokens` may be symbolic."""
    return head_width > _FAST_HEAD and not statically_known_true(tokens > _MOST_TOKENS)


def rows_of_parts(tokens: int) -> list[int]:
    """The queries of each part; the last one has what is left over.

    >>> rows_of_parts(65536)[0], rows_of_parts(35)[-1], sum(rows_of_parts(3))
    (4096, 5, 3)
    """
    rows = tokens // _PARTS
    return [rows] * (_PARTS - 1) + [tokens - (_PARTS - 1) * rows]


def _is_one_head(query: Tensor) -> bool:
    return query.ndim == 4 and all(isinstance(size, int) and size == 1 for size in query.shape[:2])


def _product(left: Tensor, right: Tensor) -> Tensor:
    """(n, m) float32, whatever numbers are multiplied. torch has no CPU kernel for that."""
    if left.device.type == "cuda" and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left.float(), right.float())


_CHANNELS_LAST: Final[Mapping[Any, Callable[..., Tensor]]] = {
    F.group_norm: group_norm,
    F.scaled_dot_product_attention: attention,
}


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
        form, named = self._forms.get(func), dict(kwargs or {})
        if form is None:
            return func(*args, **named)
        first, *others = args or [named.pop("query" if "query" in named else "input")]
        return (func if first.ndim < 3 else form)(first, *others, **named)


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
