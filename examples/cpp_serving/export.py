# SPDX-License-Identifier: MIT
"""Compiles a trained model into a package that programs in C++ run: ``python export.py MODEL model.pt2 [--int8]``."""

import argparse
from pathlib import Path

import torch
import torch.fx.experimental._config as shape_config

import ffm_ext


class Prediction(torch.nn.Module):
    """The package's entry: four tensors of a batch in, ``[B]`` probabilities out, or values as ``ffm-ext predict``."""

    def __init__(self, model: torch.nn.Module, loss: str) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: ffm_ext.SparseBatch) -> torch.Tensor:
        scores = self.model(batch, dtype=torch.float32)
        return scores if self.loss == "squared" else torch.sigmoid(scores)


def program(model: ffm_ext.FFM, loss: str = "logistic") -> torch.export.ExportedProgram:
    """Inputs indices, fields, values, offsets, of any number of samples and entries."""
    example = ffm_ext.SparseBatch.from_lists([[(0, 0, 1.0)], [(0, 0, 1.0), (0, 0, 1.0)]])
    entries, ends = torch.export.Dim("entries"), torch.export.Dim("ends", min=2)
    shapes = {"batch": [{0: entries}, {0: entries}, {0: entries}, {0: ends}]}
    # Without the patch, torch.export holds a batch of one sample to be another program.
    with torch.no_grad(), shape_config.patch(backed_size_oblivious=True):
        return torch.export.export(
            Prediction(model, loss).eval(), (example,), dynamic_shapes=shapes
        )


def package(model: ffm_ext.FFM, path: Path, loss: str = "logistic") -> None:
    """Write ``path`` (.pt2) with the :func:`program`."""
    torch._inductor.aoti_compile_and_package(program(model, loss), package_path=str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="as ffm_ext.interop.save_model writes it")
    parser.add_argument("package", type=Path, help="model.pt2, to be written")
    parser.add_argument("--int8", action="store_true", help="with a table of int8 numbers")
    arguments = parser.parse_args()
    model = ffm_ext.interop.load_model(arguments.model)
    loss = ffm_ext.interop.model_loss(arguments.model) or "logistic"
    package(ffm_ext.quantize(model) if arguments.int8 else model, arguments.package, loss)
    print(f"{arguments.package}; its operators are in {ffm_ext.library_path()}")


if __name__ == "__main__":
    main()
