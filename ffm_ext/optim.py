# SPDX-License-Identifier: MIT
"""Optimizers that update a table in place: inside ``backward`` (fused), or in :mod:`ffm_ext.training`.

An optimizer here is a description, a frozen dataclass of its numbers. ``layer.fuse_optimizer(AdaGrad(lr=0.1))`` gives
the layer its state and returns a :class:`FusedOptimizer`, which torch's learning-rate schedulers take.
"""

from __future__ import annotations

import itertools
import math
import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from ._arguments import sum_dtype

__all__ = ["SGD", "AdaGrad", "VectorAdaGrad", "Adam", "FTRL", "FusedOptimizer", "Optimizer"]


@dataclass(frozen=True)
class Optimizer:
    """What all optimizers have.

    Args:
        lr: learning rate, positive.
        weight_decay: L2, added to the gradient as ``weight_decay * weight``. Only rows that a step touches decay.
        rounding_seed: for bfloat16 tables: round weights up or down at random (so that steps below half a unit in the
            last place are not lost), replayable from this seed; ``None`` rounds to nearest.

    Raises:
        TypeError: what should be a number is none.
        ValueError: a number is negative or not finite, ``lr`` is not positive, or ``rounding_seed`` no int64.

    Numbers of NumPy become Python's.
    """

    lr: float
    weight_decay: float = 0.0
    rounding_seed: int | None = None

    name: ClassVar[str]
    state_names: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            try:
                if name == "betas":
                    value = tuple(map(_number, value))
                elif name != "rounding_seed":
                    value = _number(value)
                elif value is not None:
                    value = operator.index(value)
            except TypeError:
                raise TypeError(f"{type(self).__name__}: {name} = {value!r} is no number") from None
            object.__setattr__(self, name, value)
            is_bad = isinstance(value, float) and not 0 <= value < math.inf
            if name == "rounding_seed" and value is not None:
                is_bad = not -(2**63) <= value < 2**63
            if is_bad or (name == "lr" and value == 0):
                raise ValueError(f"{type(self).__name__}: {name} = {value} is out of range")

    def settings(self) -> list[float]:
        """``lr, weight_decay, beta1, beta2, eps, l1``, as the operators take them."""
        return [self.lr, self.weight_decay, 0.0, 0.0, 0.0, 0.0]

    def new_state(self, weight: Tensor, embed_dim: int) -> dict[str, Tensor]:
        """What is kept for a table ``[N, F·K]``: name -> tensor, float32 (float64 for a float64 table)."""
        return {name: _zeros(weight) for name in self.state_names}

    def keep_weights(
        self, weight: Tensor, states: Sequence[Tensor], lr: float, weight_decay: float
    ) -> None:
        """Let the states stand for the weights as they are, with ``lr`` and ``weight_decay``, where they stand for any.

        Args:
            weight: the table, ``[N, F·K]`` or ``[N, F, K]``.
            states: those of :meth:`new_state`, changed in place.
        """

    def stands_for(
        self, weight: Tensor, states: Sequence[Tensor], lr: float, weight_decay: float
    ) -> bool:
        """Whether they do so, to 2 %: weights may have been rounded. Arguments as of :meth:`keep_weights`."""
        return True


def _number(value: Any) -> float:
    if isinstance(value, str):
        raise TypeError  # float would read it
    return float(value)


def _zeros(weight: Tensor, fill: float = 0.0, width: int | None = None) -> Tensor:
    from .memory import empty_table

    width = weight.shape[1] if width is None else width
    return empty_table(weight.shape[0], width, dtype=sum_dtype(weight), device=weight.device).fill_(
        fill
    )


@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent: ``w -= lr · g``."""

    name: ClassVar[str] = "sgd"


@dataclass(frozen=True)
class AdaGrad(Optimizer):
    """``sum += g²;  w -= lr · g / √sum`` for each weight (Duchi et al., JMLR 12, 2011). No epsilon, as in libffm.

    Args:
        initial_accumulator: what ``sum`` starts from: 1 in libffm. ``torch.optim.Adagrad`` starts from 0.
    """

    lr: float = 0.2
    initial_accumulator: float = 1.0

    name: ClassVar[str] = "adagrad"
    state_names: ClassVar[tuple[str, ...]] = ("sum",)

    def new_state(self, weight: Tensor, embed_dim: int) -> dict[str, Tensor]:
        """``sum``, the shape of the table."""
        return {"sum": _zeros(weight, self.initial_accumulator)}


@dataclass(frozen=True)
class VectorAdaGrad(Optimizer):
    """AdaGrad with one sum for each K-vector, of the mean of ``g²`` over its elements: 1/K of the state."""

    lr: float = 0.2
    initial_accumulator: float = 1.0

    name: ClassVar[str] = "vector_adagrad"
    state_names: ClassVar[tuple[str, ...]] = ("sum",)

    def new_state(self, weight: Tensor, embed_dim: int) -> dict[str, Tensor]:
        """``sum``, ``[N, F]``."""
        return {"sum": _zeros(weight, self.initial_accumulator, weight.shape[1] // embed_dim)}


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam (Kingma, Ba, ICLR 2015) of the rows that a step touches, as ``torch.optim.SparseAdam`` does it."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    name: ClassVar[str] = "adam"
    state_names: ClassVar[tuple[str, ...]] = ("mean", "square")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"Adam: betas = {self.betas} must be two numbers in [0, 1)")
        # A feature's vector for its own field never has a gradient, and eps is all that it is divided by.
        if self.eps < torch.finfo(torch.float32).tiny:
            raise ValueError(f"Adam: eps = {self.eps} is 0 in float32")

    def settings(self) -> list[float]:
        """``lr, weight_decay, beta1, beta2, eps, l1``."""
        return [self.lr, self.weight_decay, *self.betas, self.eps, 0.0]


# With less, numbers of its states do not fit float32; it counts as 0.
_LEAST_FTRL_LR = 1e-30


@dataclass(frozen=True)
class FTRL(Optimizer):
    """FTRL-Proximal (McMahan et al., KDD 2013, Algorithm 1); ``l1`` makes weights exactly 0.

    Args:
        lr, beta: the paper's α and β.
        l1, weight_decay: the paper's λ₁ and λ₂.

    Where a schedule changes ``lr`` or ``weight_decay``, ``z`` is written anew for the whole table, so that weights
    stay; with ``lr`` 0, or less than 1e-30, nothing is updated. Weights written from outside do not stay: ``z`` does
    not know of them.
    """

    lr: float = 0.1
    beta: float = 1.0
    l1: float = 0.0

    name: ClassVar[str] = "ftrl"
    state_names: ClassVar[tuple[str, ...]] = ("z", "n")

    def settings(self) -> list[float]:
        """``lr, weight_decay, beta, 0, 0, l1``."""
        return [self.lr, self.weight_decay, self.beta, 0.0, 0.0, self.l1]

    def new_state(self, weight: Tensor, embed_dim: int) -> dict[str, Tensor]:
        """``z`` such that it stands for the weights as they are, and ``n`` = 0, each the shape of the table."""
        state = super().new_state(weight, embed_dim)
        self.keep_weights(weight, list(state.values()), self.lr, self.weight_decay)
        return state

    def keep_weights(
        self, weight: Tensor, states: Sequence[Tensor], lr: float, weight_decay: float
    ) -> None:
        """Write ``z`` anew: weights are a function of ``z``, ``n`` and the numbers."""
        z, n = states
        wide = weight.detach().view_as(z).to(z.dtype)
        size = (self.beta + n.sqrt()) / lr + weight_decay
        # Many a z stands for 0.
        z.copy_(z.clamp(-self.l1, self.l1).where(wide == 0, -wide * size - wide.sign() * self.l1))

    def stands_for(
        self, weight: Tensor, states: Sequence[Tensor], lr: float, weight_decay: float
    ) -> bool:
        """Whether the paper's closed form makes these weights of ``z`` and ``n``."""
        z, n = states
        wide = weight.detach().view_as(z).to(z.dtype)
        made = -(z - z.clamp(-self.l1, self.l1)) / ((self.beta + n.sqrt()) / lr + weight_decay)
        return torch.allclose(made, wide, rtol=0.02, atol=1e-6)


OPTIMIZERS = {cls.name: cls for cls in (SGD, AdaGrad, VectorAdaGrad, Adam, FTRL)}


class FusedOptimizer(torch.optim.Optimizer):
    """The handle on an optimizer that works inside ``backward``: ``layer.fuse_optimizer`` returns it.

    ``param_groups[0]["lr"]`` and ``["weight_decay"]`` are those of the next backward, so torch's learning-rate
    schedulers work on it. ``step`` does nothing: the update is done by then. The state of the optimizer
    is part of the layer's ``state_dict``; this one's holds the learning rate.
    """

    _all: ClassVar[weakref.WeakValueDictionary[int, FusedOptimizer]] = weakref.WeakValueDictionary()
    _handles: ClassVar[Iterator[int]] = itertools.count(1)

    # What it updates. Programs that torch.compile makes look at it; of param_groups they would depend as a whole.
    table: Tensor

    def __init__(self, layer: torch.nn.Module, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.table = layer.get_parameter("weight")
        super().__init__(
            [self.table],
            {
                "lr": optimizer.lr,
                "weight_decay": optimizer.weight_decay,
                "settled": (optimizer.lr, optimizer.weight_decay),
            },
        )
        self._take_handle()

    def _take_handle(self) -> None:
        self.handle = next(self._handles)
        self._all[self.handle] = self

    @classmethod
    def of(cls, handle: int) -> FusedOptimizer:
        """The one with this ``handle``: a number, because operators take numbers.

        Raises:
            RuntimeError: it is gone, and its layer with it.
        """
        optimizer = cls._all.get(handle)
        if optimizer is None:
            raise RuntimeError(
                "backward reached a fused layer that has been deleted: its table cannot be updated"
            )
        return optimizer

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "optimizer": self.optimizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.table = self.param_groups[0]["params"][0]
        self._take_handle()

    def follow(self, table: Tensor) -> None:
        """Update this table from now on."""
        self.table = table
        self.param_groups[0]["params"] = [table]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Only calls ``closure``: ``backward`` has updated the table already.

        Raises:
            RuntimeError: ``torch.amp.GradScaler`` calls it; or the table has a gradient, which is not of its layer's
                making: a penalty's, or that of another layer which shares it.
        """
        self.check_no_gradient("FusedOptimizer.step")
        if getattr(self, "grad_scale", None) is not None:
            raise RuntimeError(
                "FusedOptimizer.step: the loss was scaled by a GradScaler, and backward has updated the table with the "
                "scaled gradient: scale nothing (bfloat16 needs no scale), or train with grad='sparse'"
            )
        return None if closure is None else closure()

    def check_no_gradient(self, where: str) -> None:
        """Raise RuntimeError where the table has a gradient, which nothing would apply."""
        grad = self.table.grad
        # One of zeros is how torch.distributed.checkpoint lets optimizers make their state.
        if grad is not None and (grad._values() if grad.is_sparse else grad).any():
            raise RuntimeError(
                f"{where}: the table has a gradient from elsewhere than its layer (another that shares it, a penalty), "
                "and nothing would apply it: weight_decay is the optimizer's own; all else takes grad='dense' or "
                "'sparse'"
            )

    # So that GradScaler.step comes to step with its scale.
    _step_supports_amp_scaling = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: other parameters take an optimizer of their own."""
        if self.param_groups:
            raise RuntimeError(
                "FusedOptimizer.add_param_group: it updates the table of its layer alone; give other parameters an "
                "optimizer of their own"
            )
        super().add_param_group(param_group)

    @property
    def settled(self) -> tuple[float, float]:
        """``lr`` and ``weight_decay`` by which states stand for weights (see :meth:`Optimizer.keep_weights`)."""
        group = self.param_groups[0]
        lr, weight_decay = group.get("settled", (group["lr"], group["weight_decay"]))
        return float(lr), float(weight_decay)

    @settled.setter
    def settled(self, numbers: tuple[float, float]) -> None:
        self.param_groups[0]["settled"] = tuple(numbers)

    def load_state_dict(self, state_dict: Any) -> None:
        """Take the learning rate and weight decay. ``settled`` belongs to the states, which the layer loads."""
        settled = self.settled
        super().load_state_dict(state_dict)
        self.settled = settled

    def make_stand(self, weight: Tensor, states: Sequence[Tensor]) -> None:
        """Let states that were loaded stand for weights that were, where they do not by :attr:`settled`."""
        if not self.optimizer.stands_for(weight, states, *self.settled):
            self.optimizer.keep_weights(weight, states, *self.settled)

    def settle(self, weight: Tensor, states: Sequence[Tensor]) -> bool:
        """Let the states stand for the weights with the numbers of now; whether there is an update with these."""
        group = self.param_groups[0]
        now = (float(group["lr"]), float(group["weight_decay"]))
        if isinstance(self.optimizer, FTRL) and now[0] < _LEAST_FTRL_LR:
            return False
        if now != self.settled:
            self.optimizer.keep_weights(weight, states, *now)
        self.settled = now
        return True

    def update(self, step: int) -> tuple[str, list[float], int, int | None]:
        """What an operator is told of the update that comes now, the ``step``-th."""
        group, optimizer = self.param_groups[0], self.optimizer
        settings = [float(group["lr"]), float(group["weight_decay"]), *optimizer.settings()[2:]]
        return optimizer.name, settings, step, optimizer.rounding_seed


def add_state(layer: torch.nn.Module, optimizer: Optimizer) -> None:
    """Give a layer the buffers that ``optimizer`` keeps for its table: ``optimizer_step`` and one for each state."""
    # On the CPU whatever the default device: the operators read it there.
    layer.register_buffer("optimizer_step", torch.zeros((), dtype=torch.int64, device="cpu"))
    for name, tensor in optimizer.new_state(layer.weight, layer.embed_dim).items():  # type: ignore[arg-type]
        layer.register_buffer(f"optimizer_{name}", tensor)


def optimizer_state(layer: torch.nn.Module) -> list[Tensor]:
    """Those buffers, ``optimizer_step`` first."""
    return [
        buffer
        for name, buffer in layer._buffers.items()
        if name.startswith("optimizer_") and buffer is not None
    ]


def remove_state(layer: torch.nn.Module) -> None:
    """Take those buffers away again."""
    for name in [name for name in layer._buffers if name.startswith("optimizer_")]:
        delattr(layer, name)
