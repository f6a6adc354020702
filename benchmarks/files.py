# SPDX-License-Identifier: MIT
"""Libraries that read libffm's text and predict it with a model in a file."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import shutil
import subprocess
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from ffm_ext import FFM, SparseBatch, cli, interop, reference
from ffm_ext.data import SparseDataset, read_libffm, write_libffm

from .peer import Peer
from .subjects import modern_ffm
from .training import libffm_model
from .workloads import NUM_BATCHES, Workload, make_batches


@dataclass(frozen=True)
class Files:
    """A text of one-hot samples, and a model of their table, each in the formats that the readers want."""

    folder: Path
    table: Workload
    samples: int

    @property
    def num_entries(self) -> int:
        return self.samples * self.table.num_fields

    @cached_property
    def text(self) -> Path:
        path = self.folder / "test.ffm"
        size = -(-self.samples // NUM_BATCHES)
        ids = torch.cat(make_batches(replace(self.table, batch_size=size)))[: self.samples].int()
        labels = torch.arange(self.samples) % 2
        write_libffm(SparseDataset.from_arrays(ids, labels), path)
        return path

    @cached_property
    def model(self) -> FFM:
        torch.manual_seed(0)
        return libffm_model(self.table)

    @cached_property
    def ours(self) -> Path:
        interop.save_model(self.model, self.folder / "model")
        return self.folder / "model"

    @cached_property
    def libffm(self) -> Path:
        interop.save_libffm(self.model, self.folder / "model.libffm")
        return self.folder / "model.libffm"

    @cached_property
    def batch(self) -> SparseBatch:
        """The samples of the text."""
        return read_libffm(self.text).shards[0].batch

    @cached_property
    def expected(self) -> np.ndarray:
        """Their probabilities, by the reference."""
        F, weight = self.table.num_fields, self.model.interaction.weight.detach().double()
        ids = self.batch.indices.view(-1, F).long()
        scores = [reference.ffm_interaction(weight, part, grad="dense") for part in ids.split(1024)]
        # All values are 1, so the squared norm of a sample is F.
        return torch.sigmoid(torch.cat(scores) / F).numpy()


class FileEngine(Peer):
    """``read`` the text; ``predict_file``: probabilities of it in a file; ``predict`` what is in memory."""

    name: ClassVar[str]
    has_threads: ClassVar[bool] = False

    def __init__(self, files: Files) -> None:
        self.files = files
        self.output = files.folder / f"{self.name}.txt"

    def read(self) -> Any:
        raise NotImplementedError

    def entries(self, found: Any) -> int:
        """How many entries ``read`` has found."""
        raise NotImplementedError

    def predict_file(self) -> object:
        raise NotImplementedError

    def prepare(self) -> Any:
        """What ``predict`` takes."""
        raise NotImplementedError

    @cached_property
    def data(self) -> Any:
        """What ``prepare`` gives, once: it may load a model."""
        return self.prepare()

    def predict(self, data: Any) -> np.ndarray:
        raise NotImplementedError


class Ours(FileEngine):
    name = "ffm_ext"
    has_threads = True

    def read(self) -> SparseDataset:
        return read_libffm(self.files.text)

    def entries(self, found: SparseDataset) -> int:
        return found.nnz

    def predict_file(self) -> object:
        arguments = ["predict", str(self.files.text), str(self.files.ours), str(self.output)]
        with contextlib.redirect_stdout(io.StringIO()):
            assert cli.main(arguments) == 0
        return None

    def prepare(self) -> SparseBatch:
        return self.files.batch

    def predict(self, data: SparseBatch) -> np.ndarray:
        with torch.inference_mode():
            return torch.sigmoid(self.files.model(data)).numpy()


class Libffm(FileEngine):
    name = "libffm"
    module = "pylibffm"

    @classmethod
    def missing(cls) -> str | None:
        if reason := super().missing():
            return reason
        return None if shutil.which("g++") else "missing: g++, to call what pylibffm does not offer"

    @staticmethod
    @cache
    def library(folder: Path) -> ctypes.CDLL:
        """pylibffm's own code, called from C++."""
        source, target = Path(__file__).with_name("libffm_files.cpp"), folder / "libffm_files.so"
        command = ["g++", "-O2", "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(target)]
        subprocess.run(command, check=True)
        wrapper = importlib.import_module("pylibffm.wrapper")
        assert wrapper.__file__ is not None
        ctypes.CDLL(wrapper.__file__, mode=ctypes.RTLD_GLOBAL)
        library = ctypes.CDLL(str(target))
        library.predict_file.restype = ctypes.c_long
        return library

    def read(self) -> Path:
        binary = self.files.folder / "text.bin"
        binary.unlink(missing_ok=True)  # it would be taken as it is
        self.library(self.files.folder).convert_text(bytes(self.files.text), bytes(binary))
        return binary

    def entries(self, found: Path) -> int:
        """An entry takes 12 bytes of the file, which has some more for each sample."""
        return min(self.files.num_entries, found.stat().st_size // 12)

    def predict_file(self) -> object:
        paths = map(bytes, (self.files.text, self.files.libffm, self.output))
        assert self.library(self.files.folder).predict_file(*paths) == self.files.samples
        return None

    def prepare(self) -> Any:
        library = self.library(self.files.folder)
        library.load_model.restype = ctypes.c_void_p
        self.model = ctypes.c_void_p(library.load_model(bytes(self.files.libffm)))
        batch = self.files.batch
        nodes = np.empty(batch.nnz, [("field", "i4"), ("feature", "i4"), ("value", "f4")])
        nodes["field"], nodes["feature"], nodes["value"] = batch.fields, batch.indices, 1
        return nodes, batch.offsets.int().numpy()

    def predict(self, data: Any) -> np.ndarray:
        nodes, offsets = data
        n = len(offsets) - 1
        found = np.empty(n, np.float32)
        arrays = (array.ctypes.data_as(ctypes.c_void_p) for array in (nodes, offsets))
        output = found.ctypes.data_as(ctypes.c_void_p)
        self.library(self.files.folder).predict_samples(
            self.model, *arrays, ctypes.c_long(n), output
        )
        return found


class ModernFM(FileEngine):
    name = "modern-fm"
    module = "modern_fm"

    def prepare(self) -> Any:
        table, weight = self.files.table, self.files.model.interaction.weight.detach()
        # It normalises no sample: all have as many entries.
        self.model = modern_ffm(table, weight * table.num_fields**-0.5)
        return table.matrix(self.files.batch.indices.view(-1, table.num_fields))

    def read(self) -> tuple[Any, ...]:
        return tuple(importlib.import_module(self.module).load_libffm(self.files.text))

    def entries(self, found: tuple[Any, ...]) -> int:
        return int(found[0].nnz)

    def predict(self, data: Any) -> np.ndarray:
        scores = self.model.predict(data)
        return 1 / (1 + np.exp(-scores))

    def predict_file(self) -> object:
        if not hasattr(self, "model"):
            self.prepare()
        X, _, _ = importlib.import_module(self.module).load_libffm(self.files.text)
        X.resize(X.shape[0], self.files.table.num_features)
        np.savetxt(self.output, self.predict(X), fmt="%.6g")
        return None


ENGINES: tuple[type[FileEngine], ...] = (Ours, Libffm, ModernFM)
