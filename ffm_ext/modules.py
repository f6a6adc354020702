# SPDX-License-Identifier: MIT
"""The interaction and the models built on it as ``torch.nn.Module``."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from ._arguments import (
    GradMode,
    Output,
    check_contents,
    check_feature_fields,
    check_modes,
    check_positive,
    checks_contents,
    outside,
    result_dtype,
    sum_dtype,
)
from .autograd import (
    constant_in_traces,
    interaction,
    is_exporting,
    is_from_backward,
    untraced,
)
from .batch import SparseBatch, fields_of_features
from .functional import ffm_interaction
from .memory import empty_table, keep_huge_pages
from .optim import FusedOptimizer, Optimizer, add_state, optimizer_state, remove_state

__all__ = ["FFM", "FM", "FFMInteraction", "FieldAwareFactorizationMachine"]

# An interaction starts with a standard deviation of about 0.1 whatever F and K are: large enough to leave the saddle at
# zero, small beside the label.
_INITIAL_STD = 0.1


class _Sized(nn.Module):
    """A module whose ``state_dict`` says what the shapes of tensors do not tell, and which loads no other."""

    def _metadata(self) -> dict[str, Any]:
        """What ``state_dict`` says besides tensors."""
        return {}

    def _difference(self, saved: dict[str, Any]) -> str | None:
        """How what was saved differs from this module; ``None``: it can be loaded."""
        raise NotImplementedError

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            metadata.update(self._metadata())

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        difference = self._difference(local_metadata)
        if difference is not None:
            error_msgs.append(f"{prefix[:-1] or 'what was saved'} has {difference}")
            return
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )


class _Table(_Sized):
    """A table, which does not tell F from K."""

    num_fields: int
    embed_dim: int

    def _metadata(self) -> dict[str, Any]:
        return {"fields_and_factors": (self.num_fields, self.embed_dim)}

    def _difference(self, saved: dict[str, Any]) -> str | None:
        here = (self.num_fields, self.embed_dim)
        there = tuple(saved.get("fields_and_factors", here))
        if there == here:
            return None
        return f"{there[0]} fields of {there[1]} factors, the layer {here[0]} of {here[1]}"


class _OnHugePages(nn.Module):
    """A module whose tables stay on huge pages where it is moved or converted."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(lambda tensor: keep_huge_pages(tensor, fn(tensor)), recurse)  # type: ignore[no-untyped-call]


class FFMInteraction(_OnHugePages, _Table):
    """A table of field-aware factors and the fused interaction over it.

    Args:
        num_features: N, the number of rows.
        num_fields: F, the number of fields.
        embed_dim: K, the number of latent factors.
        output: ``"sum"`` -> ``[B]``, ``"dot"`` -> ``[B, P]``, ``"hadamard"`` -> ``[B, P, K]``, P = F(F-1)/2.
        within_field: also count the pairs inside one field (see :func:`ffm_ext.functional.ffm_interaction`).
        grad: the gradient of the table: ``"sparse"``, ``"dense"``, or ``"atomic"``, which is dense and on CUDA added in
            any order (see :func:`ffm_ext.functional.ffm_interaction`).
        dtype, device: of the table.

    Attributes:
        weight: ``[N, F·K]``; row ``a`` holds one K-vector for every field that feature ``a`` can meet. It is drawn from
            ``N(0, σ²)`` with σ such that an interaction starts with a standard deviation of 0.1. Above 32 MB it lies on
            huge pages (see :func:`ffm_ext.memory.empty_table`).

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is not positive, or a mode does not exist.
    """

    def __init__(
        self,
        num_features: int,
        num_fields: int,
        embed_dim: int,
        *,
        output: Output = "sum",
        within_field: bool = False,
        grad: GradMode = "sparse",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        num_features, num_fields, embed_dim = check_positive(
            "FFMInteraction", num_features=num_features, num_fields=num_fields, embed_dim=embed_dim
        )
        check_modes("FFMInteraction", output, grad)
        self.num_features = num_features
        self.num_fields = num_fields
        self.embed_dim = embed_dim
        self.output = output
        self.within_field = within_field
        self.grad = grad
        self.weight = nn.Parameter(
            empty_table(num_features, num_fields * embed_dim, dtype=dtype, device=device)
        )
        self._fused: FusedOptimizer | None = None
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the table anew, from torch's own generator or another; a fused optimizer begins anew too."""
        if not self.weight.is_meta:  # where torch would import much, and draw nothing
            std = initial_std(self.num_fields, self.embed_dim)
            nn.init.normal_(self.weight, std=std, generator=generator)
        self._reset_optimizer()

    def _reset_optimizer(self) -> None:
        if self._fused is not None:
            remove_state(self)
            add_state(self, self._fused.optimizer)
            made = self._fused.optimizer
            self._fused.settled = made.lr, made.weight_decay

    def forward(
        self,
        x: Tensor | SparseBatch,
        values: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Interaction of a batch: ``[B]``, ``[B, P]`` or ``[B, P, K]`` by ``output``.

        Args:
            x: ``[B, F]`` feature ids (int32 or int64; column = field), or a :class:`SparseBatch`.
            values: ``[B, F]``, only with ids as a tensor; ``None`` = 1.
            dtype: of the result; ``None``: that of the table. With float32, ``"sum"`` of a bfloat16 or float16 table is
                not rounded.

        Raises:
            IndexError: an id is outside ``[0, N)`` or a field outside ``[0, F)``; the text names it and its position.
            ValueError: a shape, dtype, device, offset or value is wrong.
            TypeError: ``x`` is neither a tensor nor a :class:`SparseBatch`.
        """
        check_replicas(self)
        weight = self.weight
        indices, fields, values, offsets = entry_lists("FFMInteraction", x, values, weight.dtype)
        has_grad = weight.requires_grad and torch.is_grad_enabled()
        if has_grad and (self._fused is not None or self.grad == "sparse"):
            self._check_is_parameter(weight)
        if has_grad and self._fused is not None:
            if not torch.compiler.is_compiling():
                self._fused.check_no_gradient("FFMInteraction")
            step, *states = optimizer_state(self)
            out = interaction(
                weight,
                indices,
                fields,
                values,
                offsets,
                self.num_fields,
                self.output,
                self.within_field,
                "fused",
                self._fused.handle,
                step,
                tuple(states),
            )
            return out.to(result_dtype("FFMInteraction", weight, dtype))
        return ffm_interaction(
            weight,
            indices,
            fields,
            values,
            offsets,
            num_fields=self.num_fields,
            output=self.output,
            within_field=self.within_field,
            grad=self.grad,
            dtype=dtype,
        )

    def _check_is_parameter(self, weight: Tensor) -> None:
        """Only a table that is a parameter itself can be updated in place, or take a sparse gradient."""
        if not weight.is_leaf:
            has = "a fused optimizer" if self._fused is not None else "grad='sparse'"
            raise RuntimeError(
                "FFMInteraction: weight is computed from another tensor (parametrized, say), and with "
                f"{has} it has to be the parameter itself: make the layer with grad='dense'"
            )
        if torch.compiler.is_compiling():
            return
        # Here and not once for all, because copies, pickles and load_state_dict(assign=True) lose the hooks of tensors.
        if self._fused is None and _keep_coalesced not in _hooks(weight):
            weight.register_post_accumulate_grad_hook(_keep_coalesced)

    def __prepare_scriptable__(self) -> None:
        raise no_torchscript("FFMInteraction")

    def fuse_optimizer(self, optimizer: Optimizer) -> FusedOptimizer:
        """Let every ``backward`` update the table by itself; its gradient is never made, ``weight.grad`` stays None.

        The optimizer's state becomes buffers of this layer (``optimizer_step``, ``optimizer_sum``, …), which
        ``state_dict`` holds: load one into a layer that has the same optimizer fused. A graph that was made before an
        update raises if its backward comes after it. A backward that is asked for gradients of values alone
        (``torch.autograd.grad(out, values)``, ``backward(inputs=[values])``) updates nothing; but one that
        ``torch.compile`` has traced always does. Called again, it starts anew with the new optimizer.

        Args:
            optimizer: one of :mod:`ffm_ext.optim`.

        Returns:
            The handle whose learning rate torch's schedulers change.

        Raises:
            TypeError: ``optimizer`` is something else.
        """
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                "FFMInteraction.fuse_optimizer: optimizer must be one of ffm_ext.optim, "
                f"got {type(optimizer).__name__}"
            )
        if "weight" not in self._parameters:
            raise RuntimeError(
                "FFMInteraction.fuse_optimizer: weight is parametrized, and a fused optimizer updates "
                "the parameter itself"
            )
        if type(self.weight.data) is not Tensor:
            raise TypeError(
                f"FFMInteraction.fuse_optimizer: the table is a {type(self.weight.data).__name__}, of which this "
                "process may hold a part; only a plain tensor can be updated inside backward"
            )
        self._fused = FusedOptimizer(self, optimizer)
        self._reset_optimizer()
        return self._fused

    def _metadata(self) -> dict[str, Any]:
        settled = {} if self._fused is None else {"settled": self._fused.settled}
        return {**super()._metadata(), **settled}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *others: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)
        self._follow_weight()
        if self._fused is None:
            return
        if "settled" in local_metadata:
            self._fused.settled = local_metadata["settled"]
        elif f"{prefix}optimizer_step" in state_dict and not self.weight.is_meta:
            # A plain dict of tensors, as files keep it: by which numbers its states stand for weights, it does not say.
            self._fused.make_stand(self.weight.detach(), optimizer_state(self)[1:])

    def _follow_weight(self) -> None:
        """``load_state_dict(assign=True)`` and a way to or from the meta device put another parameter in place."""
        if self._fused is not None:
            self._fused.follow(self.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FFMInteraction:
        """A fused optimizer's sums move with the table, and stay as precise as sums are where it is converted.

        Its count of updates stays on the CPU, where each backward reads it without waiting for a device.
        """
        states = {
            name: buffer
            for name, buffer in self._buffers.items()
            if name.startswith("optimizer_") and buffer is not None
        }
        super()._apply(fn, recurse)
        for name, before in states.items():
            after, dtype = self.get_buffer(name), sum_dtype(self.weight)
            if name == "optimizer_step":
                self._buffers[name] = before
            elif after.dtype != dtype:
                self._buffers[name] = keep_huge_pages(before, before.to(after.device, dtype))
        self._follow_weight()
        return self

    def extra_repr(self) -> str:
        """Sizes and modes, for ``repr``."""
        return (
            f"{self.num_features}, {self.num_fields}, {self.embed_dim}, output={self.output!r}, "
            f"within_field={self.within_field}, grad={self.grad!r}"
        )


class _Described(_Sized):
    """A module with tensors that follow from how it was described, and are neither saved nor learnt.

    They are no buffers: whoever averages those, as ``torch.optim.swa_utils`` does, would change ids.
    """

    # [F + 1], where the ids of each field begin; None: ids are those of the whole table.
    offsets: Tensor | None
    field_dims: tuple[int, ...] | None = None

    def __init__(self) -> None:
        super().__init__()
        # Attribute -> what it is, on the CPU, whatever the default device is.
        self._description: dict[str, Tensor] = {}
        self.register_load_state_dict_post_hook(_describe_what_was_loaded)  # type: ignore[no-untyped-call]

    def _describe(
        self, name: str, tensor: Tensor | None, device: torch.device | str | None
    ) -> None:
        """Keep it as an attribute, and a copy that nothing done to that attribute changes."""
        self._description.pop(name, None)
        if tensor is not None:
            self._description[name] = tensor.to("cpu", copy=True)
            tensor = tensor.to(torch.get_default_device() if device is None else device, copy=True)
        setattr(self, name, tensor)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves the module; what ``to_empty`` leaves without values gets them again."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, values in self._description.items():
            tensor = fn(getattr(self, name))
            setattr(self, name, tensor if tensor.is_meta else tensor.copy_(values))
        return self

    def _starts(self, x: Any) -> Tensor:
        """``offsets`` for ids; they stay on the meta device where only weights were put in place of those there."""
        assert self.offsets is not None
        is_left = self.offsets.is_meta and isinstance(x, Tensor) and not x.is_meta
        return self._description["offsets"] if is_left else self.offsets

    def _metadata(self) -> dict[str, Any]:
        return {} if self.field_dims is None else {"field_dims": self.field_dims}

    def _difference(self, saved: dict[str, Any]) -> str | None:
        here, there = self.field_dims, saved.get("field_dims")
        if here is None or there is None or tuple(there) == here:
            return None
        return f"fields of {list(there)} features, the model of {list(here)}"


def _describe_what_was_loaded(module: nn.Module, _: Any) -> None:
    """``load_state_dict(assign=True)`` takes a module off the meta device: what it is described by has to follow."""
    device = next(iter(module.state_dict().values())).device
    for name, values in module._description.items():  # type: ignore[union-attr, operator]
        if getattr(module, name).is_meta:
            setattr(module, name, values.to(device, copy=True))


class FieldAwareFactorizationMachine(_Described):
    """Drop-in for the layer of the same name in torchfm: per-pair Hadamard products of one-hot samples.

    Args:
        field_dims: the number of features of each field.
        embed_dim: K, the number of latent factors.
        grad: ``"dense"`` as torchfm's embeddings have it, or ``"sparse"``.
        dtype, device: of the table.

    A ``state_dict`` of the old layer (F tables ``embeddings.{g}.weight`` ``[N, K]``) loads as it is. The initial table
    is Xavier-uniform a field, as there.

    Raises:
        TypeError: a size is not an integer.
        ValueError: there is no field, or a size is not positive.
    """

    offsets: Tensor

    def __init__(
        self,
        field_dims: Sequence[int],
        embed_dim: int,
        *,
        grad: GradMode = "dense",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        field_dims = _check_dims("FieldAwareFactorizationMachine", field_dims)
        self.interaction = FFMInteraction(
            sum(field_dims),
            len(field_dims),
            embed_dim,
            output="hadamard",
            grad=grad,
            dtype=dtype,
            device=device,
        )
        self.field_dims = tuple(field_dims)
        self._describe("offsets", _field_starts(field_dims), device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table anew, one Xavier-uniform matrix ``[N, K]`` a field."""
        layer = self.interaction
        with torch.no_grad():
            table = layer.weight.view(layer.num_features, layer.num_fields, layer.embed_dim)
            for g in range(layer.num_fields):
                table[:, g] = nn.init.xavier_uniform_(torch.empty_like(table[:, g]))
        layer._reset_optimizer()

    def __prepare_scriptable__(self) -> None:
        raise no_torchscript("FieldAwareFactorizationMachine")

    def forward(self, x: Tensor) -> Tensor:
        """``[B, F]`` ids (int32 or int64) that count from 0 in every field -> ``[B, P, K]`` products.

        Raises:
            IndexError: an id is outside its field; the text names it and its position.
            ValueError: the shape or dtype is wrong.
        """
        starts = self._starts(x)
        return self.interaction(global_ids("FieldAwareFactorizationMachine", x, starts))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        tables = [f"{prefix}embeddings.{g}.weight" for g in range(self.interaction.num_fields)]
        if all(name in state_dict for name in tables):
            stacked = torch.stack([state_dict.pop(name) for name in tables], dim=1)
            state_dict[f"{prefix}interaction.weight"] = stacked.flatten(1)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Linear(_OnHugePages):
    """Adds ``bias + Σ x_a w_a`` to a score: what an additive model explains. Either part may be left out."""

    # None where the part is left out. As torch.nn.Linear has its bias, callers need not ask.
    weight: nn.Parameter | Any
    bias: nn.Parameter | Any

    def __init__(
        self,
        num_features: int,
        grad: GradMode,
        *,
        bias: bool = True,
        weight: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.grad = grad
        for name, shape, wanted in (("weight", (num_features, 1), weight), ("bias", (), bias)):
            empty = empty_table(*shape, dtype=dtype, device=device) if wanted else None
            self.register_parameter(name, None if empty is None else nn.Parameter(empty))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All zero."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self,
        score: Tensor,
        indices: Tensor,
        values: Tensor | None,
        offsets: Tensor | None,
        norms: Tensor | float | None = None,
    ) -> Tensor:
        """``score [B]`` and the terms of these entries, divided by the ``norms [B]`` of their samples.

        In the type that sums have.
        """
        if self.weight is not None:
            check_replicas(self)
            terms = self._sum(indices, values, offsets)
            score = score + (terms if norms is None else (terms / norms).to(terms.dtype))
        return score if self.bias is None else score + self.bias

    def _sum(self, indices: Tensor, values: Tensor | None, offsets: Tensor | None) -> Tensor:
        indices = _inside(indices, self.weight.shape[0])
        sparse = self.grad == "sparse" and not is_exporting()
        wide = sum_dtype(self.weight)
        if values is None and indices.dim() == 2:
            # A third of what embedding_bag takes for a few samples.
            return _embedding(indices, self.weight, sparse).sum((1, 2), dtype=wide)
        # embedding_bag rounds its sums to the type of the weights. And its sparse gradient with per_sample_weights
        # cannot be traced: the shapes that torch has for it are wrong. That of embedding can.
        untraceable = sparse and values is not None and torch.compiler.is_dynamo_compiling()
        if untraceable or self.weight.dtype != wide:
            terms = _embedding(indices, self.weight, sparse).squeeze(-1).to(wide)
            terms = terms if values is None else terms * values
            return terms.sum(1) if offsets is None else _sum_samples(terms, offsets)
        summed = nn.functional.embedding_bag(
            indices,
            self.weight,
            offsets,
            mode="sum",
            sparse=sparse,
            per_sample_weights=values,
            include_last_offset=offsets is not None,
        )
        return summed.squeeze(1)


class FFM(_Described):
    """Field-aware factorization machine: bias + linear term + interaction, as logits or predictions ``[B]``.

    The features are described in one of three ways:

    Args:
        embed_dim: K, the number of latent factors.
        field_dims: the number of features of each field.
        fields: the same by name, ``{"users": 100, "items": 50}``; or the feature ids of each field,
            ``{"users": range(0, 100), "items": [100, 101, …]}``, which together cover ``0 … N-1`` once each.
        num_features, num_fields: only the sizes.
        within_field: also count the pairs inside one field.
        grad: ``"sparse"`` or ``"dense"`` gradients of the linear weights and of the table; or ``"atomic"``, dense ones,
            of which CUDA adds that of the table in any order (see :func:`ffm_ext.functional.ffm_interaction`).
        bias: have a bias. ``linear.bias`` is ``None`` without.
        linear: have a weight for each feature. ``linear.weight`` is ``None`` without.
        normalize: divide the values of each sample by their Euclidean norm, which scales its pairs by
            ``r = 1 / Σ x²`` and its linear term by ``√r``: the instance-wise normalisation of libffm and xLearn. Values
            that are all 0 stay 0. The gradient of values passes through it.
        dtype, device: of the parameters.

    libffm's model is ``FFM(…, within_field=True, bias=False, linear=False, normalize=True)``.

    Attributes:
        field_names: the names, ``"0"``, ``"1"``, … where none were given.

    Raises:
        TypeError: a size or an id is not an integer.
        ValueError: none or several of the three descriptions are given, one contradicts itself, or a size is not
            positive.
    """

    _feature_fields: Tensor | None

    def __init__(
        self,
        embed_dim: int = 4,
        *,
        field_dims: Sequence[int] | None = None,
        fields: Mapping[str, int | Sequence[int]] | None = None,
        num_features: int | None = None,
        num_fields: int | None = None,
        within_field: bool = False,
        grad: GradMode = "sparse",
        bias: bool = True,
        linear: bool = True,
        normalize: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        by_size = num_features is not None or num_fields is not None
        if (field_dims is not None) + (fields is not None) + by_size != 1:
            raise ValueError(
                "FFM: give exactly one of field_dims, fields, or num_features with num_fields"
            )
        names: list[str] | None = None
        feature_fields: Tensor | None = None
        starts: Tensor | None = None
        if fields is not None:
            names = [str(name) for name in fields]
            sizes = list(fields.values())
            if all(isinstance(n, Integral) for n in sizes):
                field_dims = sizes  # type: ignore[assignment]
            else:
                feature_fields = _fields_from_ids(names, sizes)
                num_features, num_fields = feature_fields.numel(), len(names)
        if field_dims is not None:
            dims = _check_dims("FFM", field_dims)
            starts = _field_starts(dims)
            feature_fields = fields_of_features(dims)
            num_features, num_fields = sum(dims), len(dims)
        if num_features is None or num_fields is None:
            raise ValueError("FFM: num_features and num_fields go together")
        num_features, num_fields, embed_dim = check_positive(
            "FFM", num_features=num_features, num_fields=num_fields, embed_dim=embed_dim
        )
        self.normalize = normalize
        self.linear = _Linear(
            num_features, grad, bias=bias, weight=linear, dtype=dtype, device=device
        )
        self.interaction = FFMInteraction(
            num_features,
            num_fields,
            embed_dim,
            within_field=within_field,
            grad=grad,
            dtype=dtype,
            device=device,
        )
        # After the table: there may be no memory for so many.
        self.field_names = names or [str(f) for f in range(num_fields)]
        self.field_dims = None if starts is None else tuple(dims)
        self._describe("_feature_fields", feature_fields, device)
        self._describe("offsets", starts, device)

    @property
    def feature_fields(self) -> Tensor | None:
        """``[N]``, the field of each feature, for :meth:`SparseBatch.from_scipy` and its siblings.

        -1 is a feature of no field; ``None`` stands where only the sizes are known. It can be set, to anything that
        makes a tensor.

        Raises:
            TypeError: it is set to something else than integers.
            ValueError: it is set to another number of them, one is out of range, or they are not those of the
                ``field_dims`` that the model was made from.
        """
        return self._feature_fields

    @feature_fields.setter
    def feature_fields(self, fields: Any) -> None:
        layer = self.interaction
        if fields is not None:
            fields = check_feature_fields("FFM", fields, layer.num_features, layer.num_fields)
        if self.offsets is not None and (
            fields is None or not torch.equal(fields.cpu(), self._description["_feature_fields"])
        ):
            raise ValueError("FFM: feature_fields cannot be others than those of field_dims")
        self._describe("_feature_fields", fields, next(iter(layer.state_dict().values())).device)

    @property
    def grad(self) -> GradMode:
        """The gradient of linear weights and table, as the constructor takes it; can be set."""
        return self.interaction.grad

    @grad.setter
    def grad(self, grad: GradMode) -> None:
        check_modes("FFM", "sum", grad)
        self.interaction.grad = self.linear.grad = grad

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the table anew, from torch's own generator or another; linear weights and bias become 0."""
        self.linear.reset_parameters()
        self.interaction.reset_parameters(generator)

    def __prepare_scriptable__(self) -> None:
        raise no_torchscript("FFM")

    def forward(
        self,
        x: Tensor | SparseBatch,
        values: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Logits of a batch.

        Args:
            x: ``[B, F]`` ids, column = field: ids that count from 0 in every field where the fields were described by
                their sizes (``field_dims``, or ``fields`` with counts), else ids of the whole table; or a
                :class:`SparseBatch`, whose ids are those of the whole table.
            values: ``[B, F]``, only with ids as a tensor; ``None`` = 1.
            dtype: of the result; ``None``: that of the weights. With float32, scores of a bfloat16 or float16 table are
                not rounded.

        Returns:
            ``[B]``, in ``dtype``.

        Raises:
            IndexError: an id or a field is out of range; the text names it and its position.
            ValueError: a shape, dtype, device, offset or value is wrong.
            TypeError: ``x`` is neither a tensor nor a :class:`SparseBatch`.
        """
        if isinstance(x, Tensor) and self.offsets is not None:
            x = global_ids("FFM", x, self._starts(x))
        return self.score_table_ids(x, values, dtype=dtype)

    def score_table_ids(
        self,
        x: Tensor | SparseBatch,
        values: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The same where all ids are those of the whole table, however the fields were described."""
        values_dtype = torch.float32
        if self.normalize or values is not None or isinstance(x, SparseBatch):
            # That of the values. A quantized table has none to follow; it converts them by itself.
            values_dtype = next((parameter.dtype for parameter in self.parameters()), values_dtype)
        given = x.values if isinstance(x, SparseBatch) else values
        # float16 may not hold the sum of a sample whose values are all 1 before it is divided.
        table = getattr(self.interaction, "weight", None)
        is_half = table is not None and table.dtype == torch.float16
        wide = torch.float32 if table is None else sum_dtype(table)
        if self.normalize and (given is not None or is_half):
            x, values = self._normalized(x, values, values_dtype)
        indices, _, entry_values, offsets = entry_lists("FFM", x, values, values_dtype)
        score = self.interaction(x, values, dtype=wide)
        norms: Tensor | float | None = None
        if self.normalize and entry_values is None:
            # The squared norms, [B] or one for all, divide scores as well as values, which the kernel needs not then.
            squares: Tensor | float = self.interaction.num_fields
            if offsets is not None:
                squares = offsets.diff().clamp(min=1).double()
            score, norms = (score / squares).to(wide), squares**0.5
        score = self.linear(score, indices, entry_values, offsets, norms)
        if dtype is None and table is not None and table.dtype != wide:
            dtype = table.dtype
            for parameter in (self.linear.weight, self.linear.bias):
                dtype = dtype if parameter is None else torch.promote_types(dtype, parameter.dtype)
        return score.to(result_dtype("FFM", score, dtype))

    def _normalized(
        self, x: Tensor | SparseBatch, values: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor | SparseBatch, Tensor | None]:
        """The batch with the values of each sample divided by their Euclidean norm, and then rounded to ``dtype``."""
        # Squares are summed in float64, where those of every other dtype neither overflow nor vanish.
        indices, fields, values, offsets = entry_lists("FFM", x, values, torch.float64)
        # What the operators check comes too late here: one bad value or offset would spoil its neighbours' norms.
        check_contents("FFM", indices, values, offsets, self.interaction.num_features)
        values = unit_norm(indices, values, offsets).to(dtype)
        if fields is None or offsets is None:
            return indices, values
        return SparseBatch(indices, fields, values, offsets), None

    def extra_repr(self) -> str:
        """What the layers inside do not say, for ``repr``."""
        return f"normalize={self.normalize}"


class FM(_OnHugePages):
    """Factorization machine: bias + linear term + second-order term, ``[B]``.

    The second-order term in linear time (Rendle, "Factorization Machines", ICDM 2010, Lemma 3.1)::

        Σ_{a<b} <v_a, v_b> x_a x_b = ½ Σ_k ((Σ_a v_ak x_a)² - Σ_a v_ak² x_a²)

    Args:
        num_features: N, the number of features.
        embed_dim: K, the number of latent factors.
        grad: ``"sparse"`` or ``"dense"`` gradients of the two tables; ``"atomic"`` is dense.
        dtype, device: of the parameters.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is not positive, or a mode does not exist.
    """

    def __init__(
        self,
        num_features: int,
        embed_dim: int,
        *,
        grad: GradMode = "sparse",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        num_features, embed_dim = check_positive(
            "FM", num_features=num_features, embed_dim=embed_dim
        )
        check_modes("FM", "sum", grad)
        self.linear = _Linear(num_features, grad, dtype=dtype, device=device)
        self.weight = nn.Parameter(empty_table(num_features, embed_dim, dtype=dtype, device=device))
        self.reset_parameters()

    @property
    def grad(self) -> GradMode:
        """The gradient of both tables, as the constructor takes it; can be set."""
        return self.linear.grad

    @grad.setter
    def grad(self, grad: GradMode) -> None:
        check_modes("FM", "sum", grad)
        self.linear.grad = grad

    def reset_parameters(self) -> None:
        """Draw the factors anew, ``N(0, 0.01 / K)``; linear weights and bias become 0."""
        self.linear.reset_parameters()
        nn.init.normal_(self.weight, std=0.1 / math.sqrt(self.weight.shape[1]))

    def __prepare_scriptable__(self) -> None:
        raise no_torchscript("FM")

    def forward(self, x: Tensor | SparseBatch, values: Tensor | None = None) -> Tensor:
        """Score of a batch, ``[B]``.

        Args:
            x: ``[B, F]`` ids of the whole table (int32 or int64), or a :class:`SparseBatch`.
            values: ``[B, F]``, only with ids as a tensor; ``None`` = 1.

        Raises:
            IndexError: an id is outside ``[0, N)``; the text names it and its position.
            ValueError: a shape, dtype, device, offset or value is wrong.
            TypeError: ``x`` is neither a tensor nor a :class:`SparseBatch`.
        """
        check_replicas(self)
        indices, _, values, offsets = entry_lists("FM", x, values, self.weight.dtype)
        if indices.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"FM: x must be int32 or int64, got {indices.dtype}")
        if indices.device != self.weight.device:
            raise ValueError(f"FM: x is on {indices.device}, weight is on {self.weight.device}")
        check_contents("FM", indices, values, offsets, self.weight.shape[0])
        table_size = self.weight.shape[0]
        rows = _embedding(_inside(indices, table_size), self.weight, self.grad == "sparse")
        if indices.is_cuda:
            rows = rows.masked_fill(outside(indices, table_size).unsqueeze(-1), math.nan)
        rows = rows.to(sum_dtype(self.weight))
        if values is not None:
            rows = rows * values.unsqueeze(-1)
        if offsets is None:
            sums, squares = rows.sum(1), (rows**2).sum(1)
        else:
            sums, squares = _sum_samples(rows, offsets), _sum_samples(rows**2, offsets)
        score = self.linear((sums**2 - squares).sum(1) / 2, indices, values, offsets)
        return score.to(self.weight.dtype)


@constant_in_traces
def _of_replicas(replicas: nn.Module | None) -> tuple[bool, bool]:
    """Whether there are any, of this forward pass or those given, and whether they sum sparse gradients."""
    if replicas is None:
        replicas = nn.parallel.DistributedDataParallel._active_ddp_module
    return replicas is not None, hasattr(replicas, "sums_sparse_gradients")


def check_replicas(layer: nn.Module, replicas: nn.Module | None = None) -> None:
    """Refuse a table that would not be the same in every process, or not be the one that its fused optimizer keeps.

    Args:
        layer: any module; those without a table pass.
        replicas: the ``DistributedDataParallel`` that trains it; ``None``: the one whose forward pass this is, if any.
    """
    if not isinstance(layer, FFMInteraction | FM | _Linear) or is_exporting():
        return
    if layer.weight is None or not (torch.is_grad_enabled() and layer.weight.requires_grad):
        return
    name = type(layer).__name__
    are_replicas, sums_sparse = _of_replicas(replicas)
    fused = getattr(layer, "_fused", None)
    if fused is not None and are_replicas:
        raise RuntimeError(
            f"{name}: a layer with a fused optimizer cannot be trained under DistributedDataParallel: each process "
            "would update a table of its own. Use grad='sparse' or 'dense' with an optimizer of torch, or "
            "ffm_ext.distributed.DistributedTrainer"
        )
    # One that is computed from another is refused by the layer itself, which says why.
    is_own = fused is None or fused.table is layer.weight
    if not is_own and layer.weight.is_leaf:
        raise RuntimeError(
            f"{name}: the table is not the one that its fused optimizer updates: FSDP and functional_call put another "
            "in its place. Use grad='dense' with an optimizer of torch"
        )
    if sums_sparse and not torch.compiler.is_compiling():
        active = nn.parallel.DistributedDataParallel._active_ddp_module
        if active is not None:
            active.check_mode(layer)  # type: ignore[operator]
    if layer.grad == "sparse" and are_replicas and not sums_sparse:
        raise RuntimeError(
            f"{name}: torch's DistributedDataParallel does not take the sparse gradient of this layer: wrap the model "
            "in ffm_ext.distributed.DistributedDataParallel, or use grad='dense'"
        )


def initial_std(num_fields: int, embed_dim: int) -> float:
    """The deviation of a new table."""
    pairs = max(1, num_fields * (num_fields - 1) // 2)
    return math.sqrt(_INITIAL_STD / math.sqrt(pairs * embed_dim))


@untraced
def _keep_coalesced(weight: Tensor) -> None:
    """Say again that a sparse gradient is coalesced, which autograd forgets as it puts it into ``.grad``.

    An optimizer would sort and copy it otherwise. Rows that rise are all that the flag means; looking at them is for
    gradients that were added up or came from elsewhere, because on a GPU it waits for the backward pass.
    """
    grad = weight.grad
    if grad is None or not grad.is_sparse or grad.is_coalesced() or grad.is_meta:
        return
    rows = grad._indices()[0]
    if is_from_backward(rows) or bool((rows[1:] > rows[:-1]).all()):
        grad._coalesced_(True)


def _hooks(weight: Tensor) -> list[Any]:
    hooks = weight._post_accumulate_grad_hooks
    return [] if hooks is None else list(hooks.values())


def check_computes_ffm(where: str, model: FFM | FFMInteraction) -> None:
    """Raise TypeError where a subclass, or that of the layer inside, computes more or something else.

    Nobody would know of what is left out.
    """
    kind = FFM if isinstance(model, FFM) else FFMInteraction
    own = type(model)
    differing = [
        f"{name}() of its own"
        for name in ("forward", "score_table_ids")
        if getattr(own, name, None) is not getattr(kind, name, None)
    ]
    if isinstance(model, FFM):
        differing += [
            name
            for name, _ in model.named_parameters()
            if name.partition(".")[0] not in ("linear", "interaction")
        ]
    if differing:
        raise TypeError(
            f"{where}: {own.__name__} has {differing[0]}, and only what an {kind.__name__} computes would be kept of "
            "it: make it a module that holds one"
        )
    if isinstance(model, FFM):
        check_computes_ffm(where, model.interaction)


def no_torchscript(where: str) -> NotImplementedError:
    return NotImplementedError(
        f"{where}: TorchScript cannot compile it. torch.export and AOTInductor take its place, for programs in C++ "
        "too: see examples/cpp_serving"
    )


def entry_lists(
    where: str, x: Tensor | SparseBatch, values: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``indices, fields, values, offsets`` of either form of input, values in the dtype given: the table's."""
    if isinstance(x, SparseBatch):
        if values is not None:
            raise ValueError(f"{where}: values belong inside the SparseBatch")
        values = x.values if x.values is None else x.values.to(dtype)
        return x.indices, x.fields, values, x.offsets
    if not isinstance(x, Tensor):
        raise TypeError(f"{where}: x must be a tensor or a SparseBatch, got {type(x).__name__}")
    if x.dim() != 2:
        raise ValueError(f"{where}: ids must be [B, F], got shape {list(x.shape)}")
    if values is not None and values.is_complex():
        raise ValueError(f"{where}: values must be real, got {values.dtype}")
    if values is not None and values.shape != x.shape:
        raise ValueError(
            f"{where}: values has shape {list(values.shape)}, ids have {list(x.shape)}"
        )
    return x, None, values if values is None else values.to(dtype), None


def _inside(indices: Tensor, num_features: int) -> Tensor:
    """On CUDA: ids that PyTorch's lookups may take. One outside the table would end the process's use of the GPU."""
    return indices.clamp(0, num_features - 1) if indices.is_cuda else indices


def sample_numbers(entries: Tensor, offsets: Tensor) -> Tensor:
    """The sample of each entry, ``[nnz]``; entries: ``[nnz, ...]``."""
    return torch.arange(offsets.numel() - 1, device=entries.device).repeat_interleave(
        offsets.diff(), output_size=entries.shape[0]
    )


def _sum_samples(terms: Tensor, offsets: Tensor) -> Tensor:
    """The sums ``[B, ...]`` of the entries' terms ``[nnz, ...]``."""
    B = offsets.numel() - 1
    # torch.compile stops at index_add into a single row. Exported and traced programs are for any number of samples.
    if not is_exporting() and B == 1 and not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return terms.sum(0, keepdim=True)
    return terms.new_zeros(B, *terms.shape[1:]).index_add(0, sample_numbers(terms, offsets), terms)


def _embedding(indices: Tensor, weight: Tensor, sparse: bool) -> Tensor:
    """``weight[indices]``."""
    if sparse and indices.numel() == 1 and torch.compiler.is_dynamo_compiling():
        # torch.compile has a wrong sparse gradient of a single lookup, and the right one of two.
        rows = nn.functional.embedding(indices.flatten().repeat(2), weight, sparse=True)
        return rows.mean(0).view(*indices.shape, -1)
    return nn.functional.embedding(indices, weight, sparse=sparse)


def unit_norm(indices: Tensor, values: Tensor | None, offsets: Tensor | None) -> Tensor:
    """``values``, the shape of ``indices``, over the Euclidean norm of their sample; 0 where the norm is 0. float64."""
    if values is None:
        values = torch.ones(indices.shape, dtype=torch.float64, device=indices.device)
    if offsets is None:
        return values * _reciprocal_root(values.square().sum(1, keepdim=True))
    squares = _sum_samples(values.square(), offsets)
    return values * _reciprocal_root(squares)[sample_numbers(indices, offsets)]


def _reciprocal_root(x: Tensor) -> Tensor:
    """``x ** -½``, and 0 where x is 0, with the gradient 0."""
    zero = x == 0
    # Filled before the root too: an infinite gradient of the branch not taken would become NaN.
    return x.masked_fill(zero, 1).rsqrt().masked_fill(zero, 0)


def global_ids(where: str, x: Tensor, starts: Tensor) -> Tensor:
    """Ids of the whole table from ids ``[B, F]`` that count from 0 in every field.

    Each id is checked against its own field, since one past its end would be a valid id of the next: on the CPU, also
    in compiled and exported programs, and where :func:`ffm_ext.check_contents` asked for it.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{where}: ids must be a tensor, got {type(x).__name__}")
    # Elsewhere only where a program has moved parameters and buffers one by one.
    starts = starts.to(x.device)
    if x.device.type == "cpu":
        return torch.ops.ffm_ext.ffm_table_ids(x, starts, where)
    num_fields = starts.numel() - 1
    if x.dim() != 2 or x.shape[1] != num_fields:
        raise ValueError(
            f"{where}: ids must be [B, {num_fields}], one column a field, got {list(x.shape)}"
        )
    if checks_contents(x):
        wrong = (x < 0) | (x >= starts.diff())
        if wrong.any():
            b, f = wrong.nonzero()[0].tolist()
            raise IndexError(
                f"{where}: indices[{b}, {f}] = {int(x[b, f])} is out of range for field {f} "
                f"of {int(starts[f + 1] - starts[f])} features"
            )
    return x + starts[:-1].to(x.dtype)


def _field_starts(field_dims: Sequence[int]) -> Tensor:
    """Where each field's features start in the table, and the end: ``[F + 1]``."""
    return torch.tensor([0, *field_dims], device="cpu").cumsum(0)


def _fields_from_ids(names: Sequence[str], ids: Sequence[int | Sequence[int]]) -> Tensor:
    columns: list[Tensor] = []
    for name, features in zip(names, ids, strict=True):
        if isinstance(features, Integral):
            raise ValueError(f"FFM: fields[{name!r}] is a count where other fields list their ids")
        try:
            column = [operator.index(i) for i in features]  # type: ignore[union-attr]
        except TypeError as error:
            raise TypeError(f"FFM: fields[{name!r}] must list integer ids: {error}") from None
        columns.append(torch.tensor(column, dtype=torch.int64, device="cpu"))
    flat = torch.cat(columns)
    owners = fields_of_features([c.numel() for c in columns])
    order = flat.argsort(stable=True)
    wrong = (flat[order] != torch.arange(flat.numel(), device="cpu")).nonzero()
    if wrong.numel():
        at = order[wrong[0]]
        raise ValueError(
            f"FFM: the ids of fields must cover 0 … {flat.numel() - 1} once each; "
            f"fields[{names[int(owners[at])]!r}] has {int(flat[at])}"
        )
    return owners[order]


def _check_dims(where: str, field_dims: Sequence[SupportsIndex]) -> list[int]:
    sizes = {f"field_dims[{f}]": n for f, n in enumerate(field_dims)}
    return check_positive(where, num_fields=len(sizes), **sizes)[1:]
