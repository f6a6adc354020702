# SPDX-License-Identifier: MIT
"""The interaction as a ``torch.autograd.Function`` over the operators of ``torch.ops.ffm_ext``.

::

    FFMFunction.forward    ->  ffm_forward
    FFMFunction.backward   ->  ffm_backward            grad="dense":  gradient [N, F, K] and that of values
                                                       grad="atomic": the same, in any order
                               ffm_backward_sparse     grad="sparse": touched rows, their gradient, that of values
                               fused_step_             grad="fused":  ffm_backward_fused_ updates the table
                               ffm_backward_values     the table is frozen, values are not
                               reference.py            create_graph=True: gradients of gradients

``torch.compile`` meets all of it behind one operator, ``ffm_ext::interaction``: Dynamo traces neither sparse gradients
nor the state of an optimizer, and AOTAutograd traces both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.torch_version import TorchVersion

from . import reference
from ._arguments import alert_not_deterministic, is_batched, sum_dtype
from ._fake import new_grad_values
from .optim import FusedOptimizer

__all__ = ["constant_in_traces", "interaction", "is_exporting", "is_from_backward", "untraced"]

_ops = torch.ops.ffm_ext
_library = torch.library.Library("ffm_ext", "FRAGMENT")

# AOTAutograd refused a backward that writes to a parameter.
_TRACES_UPDATES = TorchVersion(torch.__version__) >= "2.12"
_TOO_OLD = (
    "ffm_interaction: torch.compile of a layer with a fused optimizer needs torch 2.12 or newer, this is "
    f"{torch.__version__}"
)


_F = TypeVar("_F", bound=Callable[..., Any])


def untraced(function: _F) -> _F:
    """Let Dynamo leave a function and all that it calls alone, where Python runs it after a break of the graph.

    As ``torch.compiler.disable`` does, which imports Dynamo for it and costs a microsecond a call: that is for a torch
    whose own way there has changed.
    """
    try:
        frames = torch._C._dynamo.eval_frame
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
        function._torchdynamo_disable = True  # type: ignore[attr-defined]
    except AttributeError:
        return torch.compiler.disable(function)
    return function


def constant_in_traces(function: _F) -> _F:
    """Let Dynamo call a function while it traces, and take what it returns for a constant.

    As ``torch.compiler.assume_constant_result`` does, which imports Dynamo for it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# Where the rows of sparse gradients lie that are still in use.
_rows_made: set[StorageWeakRef] = set()


def is_from_backward(rows: Tensor) -> bool:
    """Whether these are the rows of a sparse gradient as it was made here: they rise."""
    return StorageWeakRef(rows.untyped_storage()) in _rows_made


def _remember(rows: Tensor) -> None:
    for made in list(_rows_made):
        if made.expired():
            _rows_made.discard(made)
    _rows_made.add(StorageWeakRef(rows.untyped_storage()))


def is_exporting() -> bool:
    """What ``torch.compiler.is_exporting`` says, which Dynamo before torch 2.12 takes for true in every trace."""
    return torch.compiler._is_exporting_flag


def interaction(
    weight: Tensor,
    indices: Tensor,
    fields: Tensor | None,
    values: Tensor | None,
    offsets: Tensor | None,
    num_fields: int,
    output: str,
    within_field: bool,
    grad: str,
    fused: int = 0,
    step: Tensor | None = None,
    states: tuple[Tensor, ...] = (),
) -> Tensor:
    """The interaction with what gradients are needed; sums in the type that sums have.

    Arguments as those of ``functional``, already checked.

    Args:
        grad: ``"dense"``, ``"atomic"``, ``"sparse"``, or ``"fused"`` with the next three.
        fused: the ``handle`` of the :class:`~ffm_ext.optim.FusedOptimizer`.
        step, states: the buffers of the layer that its update changes.
    """
    problem = (weight, indices, fields, values, offsets, num_fields, output, within_field)
    if is_exporting():
        return _forward(*problem)
    if torch.compiler.is_compiling():
        if grad == "fused" and not _TRACES_UPDATES:
            raise RuntimeError(_TOO_OLD)
        has_sparse = grad == "sparse" and weight.requires_grad and torch.is_grad_enabled()
        if not has_sparse or _traces_sparse_gradients():
            return _ops.interaction(*problem, grad, fused, step, states)
    return _interaction(*problem, grad, fused, step, states)


@constant_in_traces
def _traces_sparse_gradients() -> bool:
    """Whether this trace takes an operator whose result is as large as its numbers say.

    It does with ``fullgraph``, or ``capture_dynamic_output_shape_ops``. Elsewhere the graph breaks, and better here
    than where torch gives up, which leaves whole functions of the package out of every graph to come.
    """
    context = torch._guards.TracingContext.try_get()
    env = None if context is None or context.fake_mode is None else context.fake_mode.shape_env
    return env is None or bool(env.allow_dynamic_output_shape_ops)


@untraced
def _interaction(*arguments: Any) -> Tensor:
    """Arguments as :func:`interaction`, all positional."""
    has_grad = _requires_grad(arguments[0]) or _requires_grad(arguments[3])
    # Forward-mode tangents do not show in requires_grad, and an operator would lose them in silence.
    if (has_grad and torch.is_grad_enabled()) or forward_ad._current_level >= 0:
        return FFMFunction.apply(*arguments)  # type: ignore[no-untyped-call]
    return _forward(*arguments[:8])


def _requires_grad(tensor: Tensor | None) -> bool:
    """Of what ``torch.func.vmap`` is called with, too, which the tensors that it hands on do not say."""
    functorch = torch._C._functorch
    while tensor is not None:
        if tensor.requires_grad:
            return True
        is_wrapped = functorch.is_functorch_wrapped_tensor(tensor)
        tensor = functorch.get_unwrapped(tensor) if is_wrapped else None
    return False


def _forward(
    weight: Tensor,
    indices: Tensor,
    fields: Tensor | None,
    values: Tensor | None,
    offsets: Tensor | None,
    num_fields: int,
    output: str,
    within_field: bool,
) -> Tensor:
    table = _table(weight, num_fields)
    return _ops.ffm_forward(table, indices, fields, values, offsets, output, within_field)


# Composite: every transform of torch sees what is inside.
_library.define(
    "interaction(Tensor weight, Tensor indices, Tensor? fields, Tensor? values, Tensor? offsets, int num_fields, "
    "str output, bool within_field, str grad, int fused, Tensor? step, Tensor[] states) -> Tensor"
)
_library.impl("interaction", _interaction, "CompositeImplicitAutograd")

# ffm_backward_fused_ with the numbers that the optimizer has when it runs, not those it had when it was traced.
_library.define(
    "fused_step_(Tensor grad_output, Tensor(a!) weight, Tensor(b!) step, Tensor(c!)[] states, Tensor? seen, "
    "Tensor indices, Tensor? fields, Tensor? values, Tensor? offsets, str output, bool within_field, "
    "bool values_grad, int fused) -> Tensor"
)


@torch.library.impl(_library, "fused_step_", "CompositeExplicitAutograd")
@untraced
def _fused_step(
    grad_output: Tensor,
    weight: Tensor,
    step: Tensor,
    states: list[Tensor],
    seen: Tensor | None,
    *arguments: Any,
) -> Tensor:
    *lists_and_modes, values_grad, handle = arguments
    if seen is not None and int(seen) != int(step):
        raise RuntimeError(
            "FFMInteraction: backward of a forward that read the table before an update: with a fused optimizer, a "
            "layer is used once in a graph; use grad='dense' or 'sparse'"
        )
    fused = FusedOptimizer.of(handle)
    if not fused.settle(weight, states):
        if not values_grad:
            return weight.new_empty(0)
        return _ops.ffm_backward_values(grad_output, weight, *lists_and_modes)
    step += 1
    update = fused.update(int(step))
    grad_values = _ops.ffm_backward_fused_(
        grad_output, weight, states, *lists_and_modes, values_grad, *update
    )
    # Whoever saved the old table for a backward of their own must not go on with the new one.
    torch.autograd.graph.increment_version(weight)
    return grad_values


@torch.library.register_fake("ffm_ext::fused_step_", lib=_library)
def _(
    grad_output: Tensor,
    weight: Tensor,
    step: Tensor,
    states: list[Tensor],
    seen: Tensor | None,
    indices: Tensor,
    fields: Tensor | None,
    values: Tensor | None,
    offsets: Tensor | None,
    output: str,
    within_field: bool,
    values_grad: bool,
    fused: int,
) -> Tensor:
    return new_grad_values(values, values_grad, weight)


def _table(weight: Tensor, num_fields: int) -> Tensor:
    """``[N, F, K]`` or ``[N, F·K]`` as ``[N, F, K]``."""
    if weight.dim() == 3:
        return weight
    return weight.view(weight.shape[0], num_fields, weight.shape[1] // num_fields)


def _differentiable_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of weight and values for ``create_graph=True`` and ``torch.func``.

    They are those of the reference, which can be differentiated again; in the type that sums have.
    """
    weight, indices, fields, values, offsets, _ = ctx.saved_tensors
    needs_weight, needs_values = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    if needs_weight and ctx.grad not in ("dense", "atomic"):
        raise RuntimeError(
            "ffm_interaction: create_graph=True needs grad='dense', and so does torch.func: with "
            f"grad={ctx.grad!r} there is no gradient that could be differentiated again"
        )

    def of(weight: Tensor, values: Tensor | None) -> Tensor:
        wide = sum_dtype(weight)
        return reference.ffm_interaction(
            weight.to(wide),
            indices,
            fields,
            None if values is None else values.to(wide),
            offsets,
            num_fields=ctx.num_fields,
            output=ctx.output,
            within_field=ctx.within_field,
            grad="dense",
        ).to(grad_output.dtype)

    if not needs_values:
        (grad_weight,) = _vjp(lambda weight: of(weight, values), weight)(grad_output)
        return grad_weight, None
    if not needs_weight:
        (grad_values,) = _vjp(lambda values: of(weight, values), values)(grad_output)
        return None, grad_values
    grad_weight, grad_values = _vjp(of, weight, values)(grad_output)
    return grad_weight, grad_values


def _vjp(
    function: Callable[..., Tensor], *inputs: Tensor
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    return torch.func.vjp(function, *inputs)[1]


def _is_traced(tensor: Tensor) -> bool:
    """Whether a program is traced, or runs on something else than plain tensors."""
    return torch.compiler.is_compiling() or type(tensor.data) is not Tensor


def _asks_for_weight(ctx: Any, grad_output: Tensor) -> bool:
    """Whether this backward pass comes to the weight: not where it was asked for gradients of other inputs alone."""
    if _is_traced(grad_output):
        return True
    node = ctx.next_functions[0][0]
    try:
        return node is not None and torch._C._will_engine_execute_node(node)
    except RuntimeError:  # that of the weight itself
        raise RuntimeError(
            "FFMInteraction: torch.autograd.grad asks for the gradient of a table that has a fused optimizer: there is "
            "none, backward updates the table; use grad='dense'"
        ) from None


def _address(weight: Tensor) -> int | None:
    """Where a table lies; ``None`` where a program is traced, which has none."""
    return None if _is_traced(weight) else weight.data_ptr()


class FFMFunction(torch.autograd.Function):
    """Arguments as :func:`interaction`, all positional."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Tensor:
        """The interaction, by one operator call."""
        return _forward(*args[:8])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs; the field sums are cheaper to read again than to keep."""
        weight, indices, fields, values, offsets, *modes = inputs
        ctx.num_fields, ctx.output, ctx.within_field, ctx.grad, ctx.fused, ctx.step, ctx.states = (
            modes
        )
        ctx.address = _address(weight) if ctx.grad == "fused" else None
        # Inside a traced graph autograd does not look whether what was saved has changed since.
        is_traced = ctx.grad == "fused" and torch.compiler.is_compiling()
        seen = ctx.step.clone() if is_traced else None
        ctx.save_for_backward(weight, indices, fields, values, offsets, seen)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        """Forward mode: not there."""
        raise NotImplementedError(
            "ffm_interaction: no forward-mode derivatives (torch.func.jvp, jacfwd, hessian, "
            "torch.autograd.forward_ad); ffm_ext.reference.ffm_interaction has them with grad='dense'"
        )

    @staticmethod
    @untraced
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``weight`` and ``values``, whichever are needed."""
        if torch.is_grad_enabled():
            first, second = _differentiable_backward(ctx, grad_output)
            return first, None, None, second, *(None,) * 8
        weight, indices, fields, values, offsets, seen = ctx.saved_tensors
        grad_output = grad_output.to(weight.dtype)
        table = _table(weight, ctx.num_fields)
        lists = (indices, fields, values, offsets, ctx.output, ctx.within_field)
        needs_weight, needs_values = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        if needs_weight and ctx.grad in ("sparse", "fused") and is_batched(grad_output):
            raise RuntimeError(
                "ffm_interaction: gradients by torch.func.vmap or is_grads_batched=True need grad='dense', this is "
                f"grad={ctx.grad!r}"
            )
        if ctx.grad == "fused":
            needs_weight = needs_weight and _asks_for_weight(ctx, grad_output)
        grad_weight: Tensor | None = None
        grad_values: Tensor | None = None
        if not needs_weight:
            grad_values = _ops.ffm_backward_values(grad_output, table, *lists)
        elif ctx.grad == "fused":
            if _address(weight) != ctx.address:
                raise RuntimeError(
                    "FFMInteraction: backward was given a copy of the table, which its fused optimizer cannot update: "
                    "hooks on saved tensors (save_on_cpu, offload_wrapper) make such; keep the layer out of them, or "
                    "use grad='dense'"
                )
            grad_values = _ops.fused_step_(
                grad_output, table, ctx.step, ctx.states, seen, *lists, needs_values, ctx.fused
            )
        elif ctx.grad in ("dense", "atomic"):
            is_atomic = ctx.grad == "atomic"
            if is_atomic and table.is_cuda:
                alert_not_deterministic(
                    "ffm_interaction: grad='atomic' adds gradients", "grad='dense'"
                )
            grad_weight, grad_values = _ops.ffm_backward(
                grad_output, table, *lists, needs_values, deterministic=not is_atomic
            )
            grad_weight = grad_weight.view(weight.shape)
        else:
            rows, grad_rows, grad_values = _ops.ffm_backward_sparse(
                grad_output, table, *lists, needs_values
            )
            _remember(rows)
            # torch.sparse_coo_tensor(check_invariants=False) of torch 2.11 warns of what it was told.
            grad_weight = torch.ops.aten._sparse_coo_tensor_unsafe(
                rows[None],
                grad_rows.view(rows.shape[0], *weight.shape[1:]),
                weight.shape,
                is_coalesced=True,
            )
        return grad_weight, None, None, grad_values if needs_values else None, *(None,) * 8
