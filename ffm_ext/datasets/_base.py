# SPDX-License-Identifier: MIT
"""What the loaders return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ffm_ext.batch import SparseBatch, fields_of_features


@dataclass(frozen=True, eq=False, repr=False)
class FieldDataset:
    """Samples in field form with their target, a fixed split and the table they were made from.

    ``FFM(num_features=ds.num_features, num_fields=ds.num_fields, ...)`` takes ``ds.data`` as it is: its
    ids are global. Where ids local to their field are asked for (``FFM(field_dims=ds.field_dims, ...)``)
    and ``data`` is a tensor, they are ``ds.data - ds.field_offsets``.

    Attributes:
        name: what the data set is called.
        data: global feature ids, int32: ``[n, F]``, column = field, where every field holds exactly one
            feature; a :class:`~ffm_ext.SparseBatch` of ``n`` samples otherwise.
        target: what is to be predicted, ``[n]`` float32.
        fields: name of each field -> the number of its features. The features of field ``f`` are the
            ids ``field_offsets[f] : field_offsets[f] + field_dims[f]``.
        feature_names: a name for each feature, ``N`` of them: ``"field=what it stands for"``.
        rows: ``"train"``, ``"valid"``, ``"test"`` -> row numbers, int64.
        frame: name -> column of ``n`` raw values; ``pandas.DataFrame(ds.frame)`` is the raw table.
        description: where the data comes from, how it is encoded and split, and its licence.
    """

    name: str
    data: Tensor | SparseBatch
    target: Tensor
    fields: dict[str, int]
    feature_names: tuple[str, ...]
    rows: dict[str, Tensor]
    frame: dict[str, npt.NDArray[Any]]
    description: str

    @property
    def field_names(self) -> tuple[str, ...]:
        """The name of each field, ``F`` of them."""
        return tuple(self.fields)

    @property
    def field_dims(self) -> tuple[int, ...]:
        """The number of features of each field, ``F`` of them."""
        return tuple(self.fields.values())

    @property
    def num_fields(self) -> int:
        """F."""
        return len(self.fields)

    @property
    def num_features(self) -> int:
        """N, over all fields."""
        return sum(self.fields.values())

    @property
    def field_offsets(self) -> Tensor:
        """The first feature id of each field, ``[F]`` int32."""
        ends = np.cumsum(self.field_dims)
        return torch.from_numpy((ends - self.field_dims).astype(np.int32))

    @property
    def feature_fields(self) -> Tensor:
        """The field of each feature, ``[N]`` int32."""
        return fields_of_features(self.field_dims).int()

    def split(self, name: str) -> tuple[Tensor | SparseBatch, Tensor]:
        """``(data, target)`` of the rows of one part: ``"train"``, ``"valid"`` or ``"test"``.

        Raises:
            KeyError: there is no such part.
        """
        if name not in self.rows:
            raise KeyError(
                f"FieldDataset.split: name = {name!r} is not one of {', '.join(self.rows)}"
            )
        rows = self.rows[name]
        return self.data[rows], self.target[rows]

    def __len__(self) -> int:
        """The number of samples, n."""
        return len(self.target)

    def __repr__(self) -> str:
        parts = ", ".join(f"{name} {len(rows)}" for name, rows in self.rows.items())
        return (
            f"FieldDataset({self.name}: {len(self)} samples ({parts}), "
            f"{self.num_features} features in {self.num_fields} fields)"
        )
