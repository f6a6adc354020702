# SPDX-License-Identifier: MIT
"""What a trained model has learnt: its strongest pairs of features, and how strongly fields interact.

Where no data is given, ``model.feature_fields`` says which feature is of which field. -1 there is none: the feature is
left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._arguments import check_size, outside, sum_dtype
from .batch import SparseBatch
from .functional import ffm_interaction
from .modules import FFM, FFMInteraction, global_ids, unit_norm

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Interaction", "field_strength", "plot_field_strength", "top_interactions"]

# Dot products that are held at a time: 16 MB of float32.
_BLOCK = 1 << 22


class Interaction(NamedTuple):
    """A pair of features and what it adds to a logit where both have the value 1."""

    feature_a: int
    feature_b: int
    field_a: int
    field_b: int
    weight: float


@torch.inference_mode()
def top_interactions(
    model: FFM, n: int = 20, *, data: Tensor | SparseBatch | None = None
) -> list[Interaction]:
    """The pairs of features with the largest ``|<w[a, f_b], w[b, f_a]>|``, the largest first.

    All pairs take O(N²·K) time, in blocks: no more than some 16 MB of them are held. Pairs inside one field are there
    where the model counts them.

    Args:
        model: trained; ``normalize`` scales what a pair adds, and is left aside here.
        n: how many.
        data: only pairs that come up in some sample, as ids ``[B, F]`` or a :class:`~ffm_ext.SparseBatch`, as the model
            takes them. Random weights of pairs that no sample has had come first otherwise, where data is sparse.

    Returns:
        At most ``n`` pairs, ``feature_a < feature_b``, ids of the whole table.

    Raises:
        TypeError: ``model`` has an int8 table; ``n`` is not an integer.
        ValueError: ``n`` is not positive; ``data`` has another number of columns than the model has fields; without
            it, the model was made from sizes alone and does not know the field of a feature: set
            ``model.feature_fields``.
        IndexError: an id or a field of ``data`` is out of range.
    """
    n = check_size("top_interactions", "n", n, least=1)
    layer = _layer(model)
    table = _table(layer)
    pairs = _all_pairs(model, table, n) if data is None else _pairs_of(model, table, n, data)
    ends = torch.empty(0, 4, dtype=torch.int64, device="cpu")
    weights = torch.empty(0, dtype=table.dtype, device="cpu")
    for found, dots in pairs:
        ends, weights = torch.cat([ends, found]), torch.cat([weights, dots])
        order = weights.abs().argsort(descending=True, stable=True)
        # A pair may come up in many blocks of samples; the first is as good as the others.
        order = order[_first_of_each(ends[order], layer)][:n]
        ends, weights = ends[order], weights[order]
    return [
        Interaction(a, b, field_a, field_b, weight)
        for (a, b, field_a, field_b), weight in zip(ends.tolist(), weights.tolist(), strict=True)
    ]


@torch.inference_mode()
def field_strength(model: FFM, data: Tensor | SparseBatch | None = None) -> Tensor:
    """How strongly two fields interact: the root mean square of their dot products.

    Args:
        model: trained.
        data: over these samples, as the model takes them, of the terms ``d[f, g]`` of a logit (values, and the model's
            normalisation, included). ``None``: over all pairs of a feature of one field with one of the other, which
            costs no more than reading the table.

    Returns:
        ``[F, F]``, symmetric, float64. The diagonal is 0 where the model does not count pairs inside one field.

    Raises:
        TypeError: ``model`` has an int8 table.
        ValueError: without ``data``, the model does not know the field of a feature: set ``model.feature_fields``;
            ``data`` has no samples, or another number of columns than the model has fields.
    """
    layer = _layer(model)
    F = layer.num_fields
    if data is not None:
        return _strength_over(model, data)
    table = _table(layer)
    members = _members(model)
    strength = torch.zeros(F, F, dtype=torch.float64, device="cpu")

    def gram(f: int, g: int) -> Tensor:
        """``Wᵀ W [K, K]`` of the vectors that the features of f keep for g."""
        vectors = table[members[f], g].double()
        return vectors.T @ vectors

    # The mean of <w_a, w_b>² over all a, b is <Wᵀ W, Vᵀ V> / (n m): no pair is looked at.
    for f in range(F):
        for g in range(f + 1, F):
            count = members[f].numel() * members[g].numel()
            square = (gram(f, g) * gram(g, f)).sum() / max(1, count)
            strength[f, g] = strength[g, f] = square.clamp(min=0).sqrt()
        count = members[f].numel() * (members[f].numel() - 1)
        if layer.within_field and count:
            own = table[members[f], f].double().square().sum(1).square().sum()
            square = (gram(f, f).square().sum() - own) / count
            strength[f, f] = square.clamp(min=0).sqrt()
    return strength


def plot_field_strength(
    model: FFM, data: Tensor | SparseBatch | None = None, *, ax: Axes | None = None
) -> Axes:
    """:func:`field_strength` as a heat map.

    Args:
        model, data: as there.
        ax: where to draw; ``None`` = a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "plot_field_strength needs matplotlib: pip install ffm-ext[plot]"
        ) from error
    strength = field_strength(model, data)
    if ax is None:
        ax = pyplot.subplots(layout="constrained")[1]
    image = ax.imshow(strength.numpy(), cmap="viridis", vmin=0)
    names, places = model.field_names, range(len(model.field_names))
    ax.set_xticks(places, names, rotation=90)
    ax.set_yticks(places, names)
    ax.set_xlabel("field")
    ax.set_ylabel("field")
    ax.set_title("Interaction of fields (root mean square)")
    figure: Any = ax.figure
    figure.colorbar(image, ax=ax)
    return ax


def _layer(model: FFM) -> FFMInteraction:
    layer = model.interaction
    if not isinstance(layer, FFMInteraction):
        raise TypeError(
            f"inspection: the model has a {type(layer).__name__}, whose table holds no weights: give the float one"
        )
    return layer


def _table(layer: FFMInteraction) -> Tensor:
    """The weights ``[N, F, K]``, on the CPU, half precision as float32."""
    weight = layer.weight.detach().cpu()
    weight = weight.to(sum_dtype(weight))
    return weight.view(layer.num_features, layer.num_fields, layer.embed_dim)


def _members(model: FFM) -> list[Tensor]:
    """The features of each field. One of field -1 is in none."""
    if model.feature_fields is None:
        raise ValueError(
            "inspection: the model was made from sizes alone and does not know the field of a feature: "
            "set model.feature_fields to a tensor [N], or give data"
        )
    fields = model.feature_fields.cpu()
    return [(fields == f).nonzero().squeeze(1) for f in range(model.interaction.num_fields)]


def _ordered(a: Tensor, b: Tensor, field_a: Tensor, field_b: Tensor) -> Tensor:
    """``[n, 4]``: the two features of each pair, the smaller first, and their fields."""
    pairs = torch.stack([a, b, field_a, field_b], dim=1)
    return torch.where((a > b)[:, None], pairs[:, [1, 0, 3, 2]], pairs)


def _first_of_each(pairs: Tensor, layer: FFMInteraction) -> Tensor:
    """Where each of the pairs ``[n, 4]`` stands for the first time, rising."""
    features = (pairs[:, 0] * layer.num_features + pairs[:, 1]).numpy()
    fields = (pairs[:, 2] * layer.num_fields + pairs[:, 3]).numpy()
    order = np.lexsort((fields, features))
    is_new = np.ones(len(order), bool)
    is_new[1:] = (np.diff(features[order]) != 0) | (np.diff(fields[order]) != 0)
    return torch.from_numpy(np.sort(order[is_new]))


def _all_pairs(model: FFM, table: Tensor, n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The ``n`` strongest pairs ``[n, 4]`` of each block of all there are, and their dot products ``[n]``."""
    members = _members(model)
    for f, of_f in enumerate(members):
        for g in range(f if model.interaction.within_field else f + 1, len(members)):
            of_g = members[g]
            others = table[of_g, f]
            for rows in of_f.split(max(1, _BLOCK // max(1, of_g.numel()))):
                dots = table[rows, g] @ others.T
                strength = _ranked(dots)
                if f == g:
                    strength.masked_fill_(rows[:, None] >= of_g, -1)
                strength, places = strength.flatten().topk(min(n, strength.numel()))
                places = places[strength >= 0]
                a, b = rows[places // others.shape[0]], of_g[places % others.shape[0]]
                yield (
                    _ordered(a, b, torch.full_like(a, f), torch.full_like(b, g)),
                    dots.flatten()[places],
                )


def _pairs_of(
    model: FFM, table: Tensor, n: int, data: Tensor | SparseBatch
) -> Iterator[tuple[Tensor, Tensor]]:
    """The ``n`` strongest pairs ``[n, 4]`` of entries in each block of samples, and their dot products ``[n]``."""
    layer = model.interaction
    for batch in _blocks(model, data):
        indices, fields = batch.indices.long(), batch.fields.long()
        sizes = (("indices", indices, layer.num_features), ("fields", fields, layer.num_fields))
        for name, ids, size in sizes:
            wrong = ids[outside(ids, size)]
            if wrong.numel():
                raise IndexError(
                    f"top_interactions: {name} has {int(wrong[0])}, out of range for {size}"
                )
        for left, right in _pairs_of_entries(batch.offsets.long()):
            keep = indices[left] != indices[right]
            if not layer.within_field:
                keep &= fields[left] != fields[right]
            pairs = _ordered(
                indices[left[keep]], indices[right[keep]], fields[left[keep]], fields[right[keep]]
            )
            pairs = pairs[_first_of_each(pairs, layer)]
            a, b, field_a, field_b = pairs.unbind(1)
            dots = (table[a, field_b] * table[b, field_a]).sum(1)
            strength, kept = _ranked(dots).topk(min(n, dots.numel()))
            kept = kept[strength >= 0]
            yield pairs[kept], dots[kept]


def _ranked(dots: Tensor) -> Tensor:
    """How strong pairs are, -1 for what is no number: ``topk`` would take it for the strongest."""
    return dots.abs().masked_fill_(dots.isnan(), -1)


def _pairs_of_entries(offsets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each entry with all that come after it in its sample, some ``_BLOCK`` pairs at a time."""
    entries = torch.arange(int(offsets[-1]), device="cpu")
    partners = offsets[1:].repeat_interleave(offsets.diff()) - entries - 1
    for begin, end in _runs(partners):
        of_each = partners[begin:end]
        left = entries[begin:end].repeat_interleave(of_each)
        starts = (of_each.cumsum(0) - of_each).repeat_interleave(of_each)
        yield left, left + 1 + torch.arange(left.numel(), device="cpu") - starts


def _runs(work: Tensor) -> Iterator[tuple[int, int]]:
    """``[begin, end)`` of things that follow each other and together take some ``_BLOCK`` of ``work``, at least one."""
    total = work.cumsum(0)
    begin = 0
    while begin < len(work):
        done = int(total[begin - 1]) if begin else 0
        end = max(begin + 1, int(torch.searchsorted(total, done + _BLOCK)))
        yield begin, end
        begin = end


def _strength_over(model: FFM, data: Tensor | SparseBatch) -> Tensor:
    layer = model.interaction
    F, weight = layer.num_fields, layer.weight.detach()
    weight = weight.to(sum_dtype(weight))  # products of half precision may not fit it
    terms = F * (F - 1) // 2 + (F if layer.within_field else 0)
    squares = torch.zeros(terms, dtype=torch.float64, device="cpu")
    samples = 0
    for batch in _blocks(model, data):
        x = batch.to(weight.device, torch.float64)
        values = unit_norm(x.indices, x.values, x.offsets) if model.normalize else x.values
        dots = ffm_interaction(
            weight,
            x.indices,
            x.fields,
            None if values is None else values.to(weight.dtype),
            x.offsets,
            num_fields=F,
            output="dot",
            within_field=layer.within_field,
        )
        squares += dots.double().square().sum(0).cpu()
        samples += len(batch)
    if not samples:
        raise ValueError("field_strength: data has no samples")
    mean = (squares / samples).sqrt()
    strength = torch.zeros(F, F, dtype=torch.float64, device="cpu")
    f, g = torch.triu_indices(F, F, 1, device="cpu")
    strength[f, g] = strength[g, f] = mean[: f.numel()]
    if layer.within_field:
        strength.diagonal().copy_(mean[f.numel() :])
    return strength


def _blocks(model: FFM, data: Tensor | SparseBatch) -> Iterator[SparseBatch]:
    """``data`` on the CPU, in pieces of samples with some ``_BLOCK`` pairs (of entries, or of fields)."""
    if isinstance(data, Tensor):
        ids = data if model.offsets is None else global_ids("FFM", data, model.offsets)
        F = model.interaction.num_fields
        if ids.dim() != 2 or ids.shape[1] != F:
            raise ValueError(
                f"inspection: data has shape {list(ids.shape)}, the model takes ids [B, {F}]"
            )
        B = len(ids)
        fields = torch.arange(F, dtype=ids.dtype, device=ids.device).repeat(B)
        offsets = torch.arange(B + 1, dtype=ids.dtype, device=ids.device) * F
        data = SparseBatch(ids.flatten(), fields, None, offsets)
    batch = data.to("cpu")
    counts = batch.offsets.diff().long()
    for begin, end in _runs(counts.square().clamp(min=model.interaction.num_fields**2)):
        yield batch[begin:end]
