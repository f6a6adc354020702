# SPDX-License-Identifier: MIT
"""Models as files: those of libffm, xLearn and torchfm, and our own.

=============================  ========================  ===================================================
format                         read                      write
=============================  ========================  ===================================================
safetensors, our own           :func:`load_model`        :func:`save_model`
libffm 1.2x binary             :func:`load_libffm`       :func:`save_libffm`
libffm 1.1x text               :func:`load_libffm`       :func:`save_libffm` with ``format="text"``
xLearn text                    :func:`load_xlearn_text`  :func:`save_xlearn_text`
torchfm, module or state_dict  :func:`from_torchfm`      :func:`to_torchfm`
torchfm, .pt or safetensors    :func:`load_torchfm`      :func:`save_torchfm`
=============================  ========================  ===================================================

No file can run code: all but torchfm's ``.pt`` are free of pickles, and that one goes through torch's restricted
unpickler, which makes tensors and plain containers only. Files are written beside the old one and renamed, so that a
full disk leaves the old one.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import struct
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ._arguments import Loss, check_choice
from ._files import atomic_write, save_tensors
from .memory import copied_table
from .modules import FFM, FFMInteraction, check_computes_ffm

__all__ = [
    "from_torchfm",
    "load_libffm",
    "load_model",
    "load_torchfm",
    "load_xlearn_text",
    "model_loss",
    "save_libffm",
    "save_model",
    "save_torchfm",
    "save_xlearn_text",
    "to_torchfm",
]

_Path = str | os.PathLike[str]

# Tables are copied and converted this much at a time.
_BLOCK_BYTES = 16 << 20
_BLOCK_LINES = 1 << 16


# ------------------------------------------------------------------------------------------ our own


_FORMAT = "ffm_ext.FFM"
_VERSION = "1"
# Of FFM: what is kept, and what its table may hold.
_MODEL_ARGUMENTS = {
    *("num_features", "num_fields", "embed_dim", "within_field", "grad", "bias", "linear"),
    *("normalize", "field_names", "field_dims"),
}
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def save_model(model: FFM, path: _Path, *, loss: Loss | None = None) -> None:
    """Write a model as one safetensors file: its weights, and the constructor's arguments as metadata.

    Args:
        model: weights of any dtype, on any device.
        path: the file, replaced if it exists.
        loss: what it was trained with, for :func:`model_loss`: whether its outputs are logits or values.

    Raises:
        TypeError: ``model`` is no :class:`~ffm_ext.FFM` with a float table.
        ValueError: there is no such loss.
        OSError: it cannot be written; a file that was there before is left as it was.
    """
    if loss is not None:
        check_choice("save_model", "loss", loss, Loss)
    arguments = model_arguments("save_model", model)
    # By these names whatever they are computed from (a parametrized table has others).
    parameters = {
        "interaction.weight": model.interaction.weight,
        "linear.weight": model.linear.weight,
        "linear.bias": model.linear.bias,
    }
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in parameters.items()
        if tensor is not None
    }
    tensors |= model_fields(model)
    metadata = {"format": _FORMAT, "version": _VERSION, "arguments": json.dumps(arguments)}
    if loss is not None:
        metadata["loss"] = loss
    save_tensors("save_model", path, tensors, metadata)


def model_loss(path: _Path) -> Loss | None:
    """The ``loss`` that :func:`save_model` was given, or ``None`` where it was given none.

    Raises:
        ValueError: the file is truncated or is no model of this format; the text names the file and what is wrong.
        OSError: it cannot be read.
    """
    with _open_model("model_loss", path) as (_, metadata, fail):
        loss = metadata.get("loss")
        if loss is not None and loss not in get_args(Loss):
            fail(f"its metadata has loss = {loss!r}, expected one of {', '.join(get_args(Loss))}")
        return cast(Loss | None, loss)


def load_model(path: _Path, *, mmap: bool = False) -> FFM:
    """Read a model that :func:`save_model` wrote, onto the CPU, in the dtype that it was saved in.

    Args:
        path: the file.
        mmap: leave the weights in the file, from which those that are used come page by page: a large table is there at
            once. To change them changes memory alone, never the file; the file must not be written into meanwhile, and
            may be replaced. They lie on small pages, so reading all of them again and again is slower.

    Raises:
        ValueError: the file is truncated or is no model of this format; the text names the file and what is wrong.
        OSError: it cannot be read.
    """
    with _open_model("load_model", path) as (file, metadata, fail):
        return _read_model(file, metadata, fail, mmap)


@contextmanager
def _open_model(where: str, path: _Path) -> Iterator[tuple[Any, dict[str, str], _Failure]]:
    """A safetensors file that says that it is a model, its metadata, and what to fail with."""
    from safetensors import SafetensorError, safe_open

    fail = _Failure(where, path)
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            for name, expected in (("format", _FORMAT), ("version", _VERSION)):
                if metadata.get(name) != expected:
                    fail(f"its metadata has {name} = {metadata.get(name)!r}, expected {expected!r}")
            yield file, metadata, fail
    except SafetensorError as error:
        fail(f"not a whole safetensors file ({error})")


def _read_model(file: Any, metadata: dict[str, str], fail: _Failure, mmap: bool) -> FFM:
    # The sizes are checked before a table is made.
    found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    try:
        arguments = json.loads(metadata["arguments"])
        N, F, K = (arguments[name] for name in ("num_features", "num_fields", "embed_dim"))
        wanted = {"interaction.weight": [N, F * K]}
        wanted |= {"linear.weight": [N, 1]} if arguments["linear"] else {}
        wanted |= {"linear.bias": []} if arguments["bias"] else {}
        wanted |= {"feature_fields": [N]} if "feature_fields" in found else {}
        if found == wanted:
            model = model_from_arguments(arguments)
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        fail(f"its metadata describes no model ({type(error).__name__}: {error})")
    if found != wanted:
        fail(f"it holds tensors of shapes {found}, its metadata says {wanted}")
    for name, parameter in model.named_parameters():
        tensor = file.get_tensor(name)
        if tensor.dtype not in _DTYPES:
            fail(f"{name} is {tensor.dtype}")
        parameter.data = tensor if mmap else copied_table(tensor)
    if "feature_fields" in found:
        try:
            model.feature_fields = file.get_tensor("feature_fields")
        except (TypeError, ValueError) as error:
            fail(str(error).removeprefix("FFM: "))
    return model


def model_arguments(where: str, model: FFM) -> dict[str, Any]:
    """What :func:`model_from_arguments` makes the same model from, weights aside. It can be written as JSON.

    What it leaves out is a tensor's job: :func:`model_fields`.

    Raises:
        TypeError: ``model`` is no :class:`~ffm_ext.FFM` with a float table.
        ValueError: its ``field_names`` do not fit its sizes.
    """
    _check_model(where, model)
    layer = model.interaction
    if len(model.field_names) != layer.num_fields:
        raise ValueError(
            f"{where}: the model has {len(model.field_names)} field_names for {layer.num_fields} fields"
        )
    arguments: dict[str, Any] = {
        "num_features": layer.num_features,
        "num_fields": layer.num_fields,
        "embed_dim": layer.embed_dim,
        "within_field": bool(layer.within_field),
        "grad": layer.grad,
        "bias": model.linear.bias is not None,
        "linear": model.linear.weight is not None,
        "normalize": bool(model.normalize),
        "field_names": model.field_names,
    }
    if model.field_dims is not None:
        arguments["field_dims"] = list(model.field_dims)
    return arguments


def model_fields(model: FFM) -> dict[str, Tensor]:
    """``feature_fields``, where :func:`model_arguments` does not tell them."""
    if model.feature_fields is None or model.field_dims is not None:
        return {}
    return {"feature_fields": model.feature_fields.cpu()}


def model_from_arguments(arguments: Mapping[str, Any]) -> FFM:
    """A new model from :func:`model_arguments`, on the CPU; its weights are yet to be written.

    Raises:
        KeyError, TypeError, ValueError: an argument is missing, unknown, or contradicts another.
    """
    options = dict(arguments)
    unknown = options.keys() - _MODEL_ARGUMENTS
    if unknown:
        raise ValueError(f"{min(unknown)!r} is no argument that is kept")
    for name in ("within_field", "bias", "linear", "normalize"):
        if not isinstance(options[name], bool):
            raise TypeError(f"{name} = {options[name]!r} is neither true nor false")
    names = [str(name) for name in options.pop("field_names")]
    if len(names) != options["num_fields"]:
        raise ValueError(f"{len(names)} field_names for num_fields = {options['num_fields']}")
    if "field_dims" in options:
        sizes = {
            "num_features": sum(options["field_dims"]),
            "num_fields": len(options["field_dims"]),
        }
        for name, size in sizes.items():
            if options.pop(name) != size:
                raise ValueError(f"{name} = {arguments[name]}, but field_dims make {size}")
    with torch.device("cpu"), _WithoutInit():
        model = FFM(**options)
    model.field_names = names
    return model


# ------------------------------------------------------------------------------------------ libffm


# num_features, num_fields, embed_dim, normalization
_LIBFFM_HEADER = struct.Struct("<iii?")
_LIBFFM_TEXT = re.compile(rb"n \d+\s+m \d+\s")
# Weights that stand together, and after them their accumulators: 4 where libffm was built with SSE, which is what it
# does on x86, else 1.
_LIBFFM_LANES = 4


def load_libffm(path: _Path) -> FFM:
    """Read a model of libffm: the binary of versions 1.2x or the text of versions up to 1.1x, told apart by content.

    Returns:
        ``FFM(embed_dim, num_features=, num_fields=, bias=False, linear=False, within_field=True, normalize=…)``, whose
        logit is libffm's score: pairs of all entries times ``r = 1 / Σ x²``. Its ids are those of the data file.
        AdaGrad's accumulators, which the binary holds too, are left out.

    A libffm that was built without SSE orders the binary in another way. Where sizes do not tell which, accumulators
    do: they are 1 or more.

    Raises:
        ValueError: the file is truncated, holds more than it should, or is no model of libffm, or a weight is not
            finite; the text names the file, and the offset or the line. Or weights and accumulators cannot be told
            apart.
        OSError: it cannot be read.
    """
    fail = _Failure("load_libffm", path)
    with open(path, "rb") as file:
        start = file.read(64)
        file.seek(0)
        if _LIBFFM_TEXT.match(start):
            return _load_libffm_text(file, fail)
    return _load_libffm_binary(Path(path), start, fail)


def save_libffm(
    model: FFM,
    path: _Path,
    *,
    format: Literal["binary", "text"] = "binary",
    accumulators: Tensor | None = None,
) -> None:
    """Write a model that libffm can read: ``"binary"`` for its versions 1.2x, ``"text"`` for those before.

    Args:
        model: what libffm can express: no bias and no linear weights, or such as are 0; ``within_field=True``.
        path: the file, replaced if it exists.
        format: ``"binary"`` is float32, ``"text"`` has 9 digits, which read back as the same float32.
        accumulators: AdaGrad's sums of squared gradients, ``[N, F·K]``, for the binary, 1 or more, as in libffm;
            ``None`` = 1, as libffm starts.

    Raises:
        TypeError: ``model`` is no :class:`~ffm_ext.FFM` with a float table, or ``accumulators`` no tensor.
        ValueError: libffm has no place for a part of the model or for its size; a weight is not finite; ``format``
            does not exist; ``accumulators`` has another shape, a number below 1 or none in float32, or goes with text.
        OSError: it cannot be written; a file that was there before is left as it was.
    """
    _check_model("save_libffm", model)
    layer = model.interaction
    for part, name in (("bias", "bias"), ("weight", "linear")):
        weights = getattr(model.linear, part)
        if weights is not None and weights.any():
            raise ValueError(
                f"save_libffm: the model has {name} = True and weights in it, and libffm has no place for these"
            )
    _check_within_field("save_libffm", "libffm counts", model, True)
    if format not in ("binary", "text"):
        raise ValueError(f"save_libffm: format = {format!r} is not one of binary, text")
    if accumulators is not None and format == "text":
        raise ValueError("save_libffm: the text format has no place for accumulators")
    kind: type[Any] = type(accumulators)
    if accumulators is not None and not issubclass(kind, Tensor):
        raise TypeError(f"save_libffm: accumulators must be a tensor, got {kind.__name__}")
    if accumulators is not None and accumulators.shape != layer.weight.shape:
        raise ValueError(
            f"save_libffm: accumulators has shape {list(accumulators.shape)}, "
            f"the table has {list(layer.weight.shape)}"
        )
    sizes = layer.num_features, layer.num_fields, layer.embed_dim
    for name, size in zip(("num_features", "num_fields", "embed_dim"), sizes, strict=True):
        if size >= 1 << 31:
            raise ValueError(f"save_libffm: {name} = {size} does not fit the 32 bits of the format")
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        if format == "text":
            names = ("n", "m", "k", "normalization")
            for name, size in zip(names, (*sizes, int(model.normalize)), strict=True):
                file.write(f"{name} {size}\n".encode())
            _write_vectors("save_libffm", file, layer, "w%d,%d ")
            return
        file.write(_LIBFFM_HEADER.pack(*sizes, model.normalize))
        F, K = layer.num_fields, layer.embed_dim
        groups = -(-K // _LIBFFM_LANES)
        for begin, block in _finite_blocks("save_libffm", layer):
            body = np.zeros((len(block), F, groups, 2, _LIBFFM_LANES), "<f4")
            body[:, :, :, 0] = _in_groups(block, groups, 0.0)
            if accumulators is None:
                body[:, :, :, 1] = 1
            else:
                sums = accumulators[begin : begin + len(block)].detach().to("cpu", torch.float32)
                wrong = sums[~((sums >= 1) & sums.isfinite())]
                if wrong.numel():
                    raise ValueError(
                        f"save_libffm: accumulators has {wrong[0].item()}; libffm's are 1 or more, in float32"
                    )
                body[:, :, :, 1] = _in_groups(sums.numpy().reshape(block.shape), groups, 1.0)
            file.write(body.data)


def _in_groups(block: np.ndarray, groups: int, fill: float) -> np.ndarray:
    """``[n, F, K]`` filled up to whole groups of four, ``[n, F, groups, 4]``."""
    n, F, K = block.shape
    padded = np.pad(block, ((0, 0), (0, 0), (0, groups * _LIBFFM_LANES - K)), constant_values=fill)
    return padded.reshape(n, F, groups, _LIBFFM_LANES)


def _load_libffm_binary(path: Path, start: bytes, fail: _Failure) -> FFM:
    size = path.stat().st_size
    if size < _LIBFFM_HEADER.size:
        fail(f"{size} bytes are too few for a model of libffm, whose header has 13")
    *sizes, normalize = _LIBFFM_HEADER.unpack(start[: _LIBFFM_HEADER.size])
    for i, name in enumerate(("num_features", "num_fields", "embed_dim")):
        if sizes[i] <= 0:
            fail(f"offset {4 * i}: {name} = {sizes[i]} must be positive; is it a model of libffm?")
    if start[12] > 1:
        fail(f"offset 12: normalization = {start[12]} is neither 0 nor 1; is it a model of libffm?")
    N, F, K = sizes
    vectors = {lanes: -(-K // lanes) * 2 * lanes for lanes in (_LIBFFM_LANES, 1)}
    expected = {lanes: _LIBFFM_HEADER.size + N * F * n * 4 for lanes, n in vectors.items()}
    found = [lanes for lanes, bytes_ in expected.items() if size == bytes_]
    if not found:
        most = expected[_LIBFFM_LANES]
        fail(
            f"it has {size} bytes, but a model of num_features = {N}, num_fields = {F}, embed_dim = {K} has "
            f"{most}; is it {'truncated' if size < most else 'a model of libffm'}?"
        )
    lanes = _libffm_lanes(path, N, F * vectors[found[0]], found, fail)
    vector = vectors[lanes]
    model = _libffm_model(N, F, K, normalize)
    body = np.memmap(path, "<f4", "r", _LIBFFM_HEADER.size, (N, F, vector // 2 // lanes, 2, lanes))
    for begin, table in _row_blocks(model.interaction, model.interaction.weight):
        weights = body[begin : begin + len(table), :, :, 0].reshape(*table.shape[:2], -1)
        table[...] = weights[..., :K]
        if (wrong := _not_finite(table)) is not None:
            a, f, k = wrong
            group, lane = divmod(k, lanes)
            entry = ((begin + a) * F + f) * vector + group * 2 * lanes + lane
            fail(
                f"offset {_LIBFFM_HEADER.size + 4 * entry}: factor {k} of feature {begin + a} for field {f} is "
                f"{table[wrong]}"
            )
    return model


def _libffm_lanes(path: Path, N: int, row: int, found: list[int], fail: _Failure) -> int:
    """Which of the lanes that the size of a binary leaves it has: accumulators begin at 1 and never fall."""
    body = np.memmap(path, "<f4", "r", _LIBFFM_HEADER.size, (N, row))
    rows = max(1, _BLOCK_BYTES // (4 * row))
    for begin in range(0, N, rows):
        if len(found) < 2:
            break
        block = body[begin : begin + rows]
        if (block.reshape(-1, 2, _LIBFFM_LANES)[:, 1] == 1).all():  # weights are not, by chance
            return _LIBFFM_LANES
        found = [n for n in found if not (block.reshape(-1, 2, n)[:, 1] < 1).any()]
    if len(found) != 1:
        fail(
            "weights and AdaGrad's accumulators, which are 1 or more, cannot be told apart: "
            f"{'both' if found else 'neither'} would do; is it a model of libffm?"
        )
    return found[0]


def _load_libffm_text(file: BinaryIO, fail: _Failure) -> FFM:
    header = []
    for number, name in enumerate((b"n", b"m", b"k", b"normalization"), 1):
        line = file.readline()
        match = re.fullmatch(name + rb" (\d{1,10})\s*", line)
        if match is None:
            fail(f"line {number}: expected '{name.decode()} <number>', found {_shown(line)}")
        header.append(int(match[1]))
        if not 0 < header[-1] < 1 << 31 and name != b"normalization":
            fail(f"line {number}: {_shown(line)} is no size")
    N, F, K, normalize = header
    if normalize > 1:
        fail(f"line 4: normalization = {normalize} is neither 0 nor 1")
    _check_text_holds(file, N, F, K, fail)
    model = _libffm_model(N, F, K, bool(normalize))
    _read_vectors(file, model.interaction, "w%d,%d ", 5, fail)
    return model


def _libffm_model(N: int, F: int, K: int, normalize: bool) -> FFM:
    return _float_model(N, F, K, normalize=normalize, bias=False, linear=False)


# ------------------------------------------------------------------------------------------ xLearn


def load_xlearn_text(path: _Path, *, normalize: bool = True) -> FFM:
    """Read a field-aware model that xLearn wrote as text (``setTXTModel``, ``-t``).

    Lines ``bias: b``, then ``i_{a}: w`` for each feature, then ``v_{a}_{g}: x x …`` for each feature and field.

    Args:
        path: the file.
        normalize: whether it was trained with instance-wise normalisation, xLearn's default, which the file leaves out.

    Returns:
        ``FFM(embed_dim, num_features=, num_fields=, within_field=True, normalize=normalize)``, whose logit is xLearn's
        score, ``bias + √r Σ w x + r Σ <v, v> x x`` with ``r = 1 / Σ x²``, over all pairs of entries.

    Raises:
        ValueError: the file is truncated, is a model of another kind, or a number is not finite; the text names the
            file and the line.
        OSError: it cannot be read.
    """
    fail = _Failure("load_xlearn_text", path)
    with open(path, "rb") as file:
        bias = _number(file.readline(), "bias: ", 1, fail)
        linear = array("f")
        while (line := file.readline()).startswith(b"i_"):
            linear.append(_number(line, f"i_{len(linear)}: ", 2 + len(linear), fail))
        N, first_line = len(linear), 2 + len(linear)
        F, K = _xlearn_sizes(file, line, N, fail)
        file.seek(-len(line), os.SEEK_CUR)
        model = _float_model(N, F, K, normalize=normalize)
        _read_vectors(file, model.interaction, "v_%d_%d: ", first_line, fail)
    with torch.no_grad():
        model.linear.bias.fill_(bias)
        model.linear.weight.copy_(torch.frombuffer(linear, dtype=torch.float32)[:, None])
    return model


def save_xlearn_text(model: FFM, path: _Path) -> None:
    """Write a model in xLearn's text format, as :func:`load_xlearn_text` describes it.

    What the format leaves out is for the reader to know: ``normalize``, and that pairs inside one field count. A bias
    or linear weights that the model does not have are written as 0. Numbers have 9 digits, which read back as the same
    float32.

    Args:
        model: with ``within_field=True``, as xLearn counts.
        path: the file, replaced if it exists.

    Raises:
        TypeError: ``model`` is no :class:`~ffm_ext.FFM` with a float table.
        ValueError: it has ``within_field=False``, or a weight is not finite.
        OSError: it cannot be written; a file that was there before is left as it was.
    """
    _check_model("save_xlearn_text", model)
    _check_within_field("save_xlearn_text", "xLearn counts", model, True)
    layer, bias, linear = model.interaction, model.linear.bias, model.linear.weight
    weights = (
        torch.zeros(layer.num_features, 1, device="cpu") if linear is None else linear.detach()
    )
    start = 0.0 if bias is None else bias.item()
    wrong = (~weights[:, 0].float().isfinite()).nonzero()
    if len(wrong):
        a = int(wrong[0])
        raise ValueError(
            f"save_xlearn_text: the linear weight of feature {a} is {weights[a].item()}"
        )
    if not math.isfinite(start):
        raise ValueError(f"save_xlearn_text: the bias is {start}")
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(b"bias: %.9g\n" % start)
        for begin in range(0, layer.num_features, _BLOCK_LINES):
            lines = enumerate(weights[begin : begin + _BLOCK_LINES, 0].tolist(), begin)
            file.write(b"".join(b"i_%d: %.9g\n" % line for line in lines))
        _write_vectors("save_xlearn_text", file, layer, "v_%d_%d: ")


def _xlearn_sizes(file: BinaryIO, line: bytes, N: int, fail: _Failure) -> tuple[int, int]:
    """``F, K`` from the last line of the file; ``line`` is the first that belongs to the table."""
    if re.match(rb"v_\d+: ", line):
        fail(f"line {2 + N}: {_shown(line)} belongs to a factorization machine without fields")
    if not N or not line:
        fail(f"line {2 + N}: the model has no {'factors' if N else 'linear weights'}")
    here, size = file.tell(), os.fstat(file.fileno()).st_size
    tail, tail_bytes = b"", 1 << 12
    while b"\n" not in tail[:-1] and len(tail) < size:
        tail_bytes *= 4
        file.seek(max(0, size - tail_bytes))
        tail = file.read(tail_bytes)
    last = tail.splitlines(keepends=True)[-1]
    file.seek(here)
    match = re.fullmatch(rb"v_(\d{1,19})_(\d{1,19}): (.*)\n", last)
    if match is None:
        fail(f"the last line, {_shown(last)}, is no vector of factors; is it truncated?")
    if int(match[1]) != N - 1:
        fail(f"it has {N} linear weights, but ends at {_shown(last)}; is it truncated?")
    F, K = int(match[2]) + 1, len(match[3].split())
    if not K:
        fail(f"the last line, {_shown(last)}, has no factors")
    _check_text_holds(file, N, F, K, fail)
    return F, K


# ------------------------------------------------------------------------------------------ torchfm


_ZIP = b"PK\x03\x04"


def from_torchfm(
    source: nn.Module | Mapping[str, Tensor], *, field_dims: Sequence[int] | None = None
) -> FFM:
    """The model of torchfm's ``FieldAwareFactorizationMachineModel``, whose output is the sigmoid of this one's.

    torchfm's F tables ``[N, K]`` become one ``[N, F·K]``. The interaction layer alone needs no conversion:
    :class:`~ffm_ext.FieldAwareFactorizationMachine` loads its ``state_dict``.

    Args:
        source: the module, or its ``state_dict``, whose file :func:`load_torchfm` takes: ``linear.bias`` ``[1]``,
            ``linear.fc.weight`` ``[N, 1]``, ``ffm.embeddings.{g}.weight`` ``[N, K]`` for every field.
        field_dims: the number of features of each field. A module knows them; with a ``state_dict`` they let the model
            take ids that count from 0 in every field, as torchfm's does. Without, ids are those of the whole table.

    Returns:
        An :class:`~ffm_ext.FFM` on the CPU, in the dtype of the tables, with copies of the weights.

    Raises:
        ValueError: a tensor is missing, is not expected, or has a shape that does not fit; the text names it.
    """
    if isinstance(source, nn.Module):
        tensors: Mapping[str, Tensor] = source.state_dict()
    else:
        tensors = source
    fail = _Failure("from_torchfm", None)
    tables = sorted(
        (name for name in tensors if re.fullmatch(r"ffm\.embeddings\.\d+\.weight", name)),
        key=lambda name: int(name.split(".")[2]),
    )
    F = len(tables)
    wanted = ["linear.bias", "linear.fc.weight", *(f"ffm.embeddings.{g}.weight" for g in range(F))]
    for name in wanted:
        if name not in tensors:
            fail(f"source has no {name}")
    unknown = [name for name in tensors if name not in wanted]
    if unknown:
        fail(f"source has {unknown[0]}, which is no part of torchfm's model")
    if not F:
        fail("source has no ffm.embeddings.0.weight")
    first = tensors[tables[0]]
    if first.dim() != 2:
        fail(f"{tables[0]} has shape {list(first.shape)}, expected [N, K]")
    N, K = first.shape
    shapes = {"linear.bias": [1], "linear.fc.weight": [N, 1]} | {name: [N, K] for name in tables}
    for name, shape in shapes.items():
        if list(tensors[name].shape) != shape:
            fail(f"{name} has shape {list(tensors[name].shape)}, expected {shape}")
        if not tensors[name].is_floating_point():
            fail(f"{name} is {tensors[name].dtype}, expected a floating-point type")
    if field_dims is None and isinstance(source, nn.Module):
        starts = [int(start) for start in getattr(source.get_submodule("ffm"), "offsets", ())]
        field_dims = [b - a for a, b in pairwise([*starts, N])] if len(starts) == F else None
    if field_dims is not None and (sum(field_dims) != N or len(field_dims) != F):
        fail(
            f"field_dims has {len(field_dims)} fields of {sum(field_dims)} features, not {F} of {N}"
        )
    sizes = (
        {"num_features": N, "num_fields": F} if field_dims is None else {"field_dims": field_dims}
    )
    with torch.device("cpu"), _WithoutInit():
        model = FFM(K, **sizes).to(first.dtype)
    with torch.no_grad():
        model.linear.bias.copy_(tensors["linear.bias"][0])
        model.linear.weight.copy_(tensors["linear.fc.weight"])
        table = model.interaction.weight.view(N, F, K)
        for g, name in enumerate(tables):
            table[:, g] = tensors[name]
    return model


def to_torchfm(model: FFM) -> dict[str, Tensor]:
    """The ``state_dict`` that torchfm's ``FieldAwareFactorizationMachineModel`` has for a model.

    torchfm's ``field_dims``, which it does not hold, are the sizes of the fields; that needs ids which are numbered
    field after field, as with ``FFM(field_dims=…)``. torchfm has one feature of value 1 in every field, and nothing
    else.

    Args:
        model: with ``normalize=False`` and ``within_field=False``. A bias or linear weights that it does not have are
            zeros.

    Returns:
        ``linear.bias`` ``[1]``, ``linear.fc.weight`` ``[N, 1]``, ``ffm.embeddings.{g}.weight`` ``[N, K]`` for every
        field: copies on the CPU, in the dtypes of the model.

    Raises:
        TypeError: ``model`` is no :class:`~ffm_ext.FFM` with a float table.
        ValueError: it has ``normalize=True`` or ``within_field=True``.
    """
    _check_model("to_torchfm", model)
    if model.normalize:
        raise ValueError(
            "to_torchfm: the model has normalize = True, and torchfm has no place for it"
        )
    _check_within_field("to_torchfm", "torchfm has no place for", model, False)
    layer, linear = model.interaction, model.linear
    N, F, K = layer.num_features, layer.num_fields, layer.embed_dim
    table = layer.weight.detach().view(N, F, K)
    bias = table.new_zeros(1) if linear.bias is None else linear.bias.detach().view(1)
    weights = table.new_zeros(N, 1) if linear.weight is None else linear.weight.detach()
    state = {"linear.bias": bias, "linear.fc.weight": weights}
    state |= {f"ffm.embeddings.{g}.weight": table[:, g] for g in range(F)}
    contiguous = torch.contiguous_format
    return {name: tensor.cpu().clone(memory_format=contiguous) for name, tensor in state.items()}


def load_torchfm(path: _Path, *, field_dims: Sequence[int] | None = None) -> FFM:
    """Read a ``state_dict`` of torchfm's field-aware model, as ``torch.save`` or safetensors wrote it.

    A ``.pt`` (a zip archive, as torch writes it since 1.6) goes through ``torch.load(weights_only=True)``, whose
    unpickler makes tensors and plain containers, and refuses all else before it runs. So a file that holds a whole
    module is refused.

    Args:
        path: the file; what it is is told by content.
        field_dims: as for :func:`from_torchfm`.

    Returns:
        What :func:`from_torchfm` makes of it.

    Raises:
        ValueError: the file is truncated, holds something else or more than tensors, or a tensor is missing, is not
            expected, or has a shape that does not fit; the text names the file and what is wrong.
        OSError: it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    fail = _Failure("load_torchfm", path)
    with open(path, "rb") as file:
        is_zip = file.read(len(_ZIP)) == _ZIP
    if is_zip:
        state = _load_pt(path, fail)
    else:
        try:
            state = load_file(os.fspath(path))
        except SafetensorError as error:
            fail(f"neither a file of torch.save nor a whole safetensors file ({error})")
    try:
        return from_torchfm(state, field_dims=field_dims)
    except ValueError as error:
        fail(str(error).removeprefix("from_torchfm: "))


def _load_pt(path: _Path, fail: _Failure) -> Mapping[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what a file says in its pickle may fail in any way
        # torch goes on to advise weights_only=False: its first sentence alone says what was found.
        text = str(error.__context__ or error).strip() or type(error).__name__
        fail(
            f"torch.load(weights_only=True) refuses it ({text.splitlines()[0].split('. ')[0]}); "
            "is it truncated, or more than a state_dict?"
        )
    if not isinstance(state, Mapping):
        fail(f"it holds a {type(state).__name__}, expected a state_dict")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            fail(f"it holds a {type(tensor).__name__} as {name!r}, expected tensors with names")
        # A view may claim any shape, and its memory would be asked for when it is copied.
        is_plain = tensor.layout == torch.strided and not tensor.is_nested and tensor.is_cpu
        if not is_plain or tensor.nbytes > tensor.untyped_storage().nbytes():
            fail(f"{name} is no dense tensor with all its elements in the file")
    return cast(Mapping[str, Tensor], state)


def save_torchfm(model: FFM, path: _Path, *, format: Literal["pt", "safetensors"] = "pt") -> None:
    """Write :func:`to_torchfm` of a model into a file.

    Args:
        model: as there.
        path: the file, replaced if it exists.
        format: ``"pt"`` is for ``torch.load(path, weights_only=True)``.

    Raises:
        TypeError, ValueError: as :func:`to_torchfm`; or ``format`` does not exist.
        OSError: it cannot be written; a file that was there before is left as it was.
    """
    if format not in ("pt", "safetensors"):
        raise ValueError(f"save_torchfm: format = {format!r} is not one of pt, safetensors")
    state = to_torchfm(model)
    if format == "safetensors":
        save_tensors("save_torchfm", path, state)
        return
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's own writer hides what the system said
            raise OSError(f"save_torchfm: {os.fspath(path)}: {error}") from error


# ------------------------------------------------------------------------------------------ shared


class _WithoutInit(TorchFunctionMode):
    """Modules that are made here keep their memory as it is: all of it is written next, and a table is large."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # zero_: by which empty_table touches its pages.
        if getattr(func, "__module__", None) == "torch.nn.init" or func is Tensor.zero_:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


class _Failure:
    """Raises ValueError with a text that begins with the function and the file."""

    def __init__(self, where: str, path: _Path | None) -> None:
        self.start = where if path is None else f"{where}: {os.fspath(path)}"

    def __call__(self, text: str) -> NoReturn:
        raise ValueError(f"{self.start}: {text}")


def _check_model(where: str, model: Any) -> None:
    if not isinstance(model, FFM) or not isinstance(model.interaction, FFMInteraction):
        found = type(model).__name__
        if isinstance(model, FFM):
            found += f" with a {type(model.interaction).__name__}, whose state_dict can be kept"
        raise TypeError(f"{where}: model must be an FFM with a float table, got {found}")
    check_computes_ffm(where, model)


def _check_within_field(where: str, peer_does: str, model: FFM, wanted: bool) -> None:
    if model.interaction.within_field != wanted:
        raise ValueError(
            f"{where}: the model has within_field = {not wanted}, and {peer_does} the pairs inside one field; "
            f"if no sample has two features of one field, set model.interaction.within_field = {wanted}"
        )


def _float_model(N: int, F: int, K: int, **options: Any) -> FFM:
    """A model that counts pairs as libffm and xLearn do, whose table :func:`_row_blocks` is to write to."""
    with torch.device("cpu"), _WithoutInit():
        return FFM(K, num_features=N, num_fields=F, within_field=True, **options).float()


def _row_blocks(layer: FFMInteraction, table: Tensor) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks ``[n, F, K]`` of a table ``[N, F·K]`` with their first rows: float32, on the CPU; views where it is."""
    rows = max(1, _BLOCK_BYTES // (4 * table.shape[1]))
    for begin in range(0, layer.num_features, rows):
        block = table.detach()[begin : begin + rows].to("cpu", torch.float32)
        yield begin, block.numpy().reshape(-1, layer.num_fields, layer.embed_dim)


def _finite_blocks(where: str, layer: FFMInteraction) -> Iterator[tuple[int, np.ndarray]]:
    """:func:`_row_blocks` of a table that is to be saved for those who take finite weights alone."""
    for begin, block in _row_blocks(layer, layer.weight):
        if (found := _not_finite(block)) is not None:
            a, f, k = found
            raise ValueError(
                f"{where}: factor {k} of feature {begin + a} for field {f} is {block[found]}"
            )
        yield begin, block


def _not_finite(block: np.ndarray) -> tuple[int, int, int] | None:
    """The place of the first number in a block ``[n, F, K]`` that is not finite."""
    finite = np.isfinite(block)
    return None if finite.all() else tuple(np.argwhere(~finite)[0].tolist())


def _write_vectors(where: str, file: BinaryIO, layer: FFMInteraction, prefix: str) -> None:
    """A line for each feature and field: ``prefix % (feature, field)`` and the K factors."""
    form = (prefix + " ".join(["%.9g"] * layer.embed_dim) + "\n").encode()
    for begin, block in _finite_blocks(where, layer):
        lines = (
            form % (a, f, *vector)
            for a, row in enumerate(block.tolist(), begin)
            for f, vector in enumerate(row)
        )
        file.write(b"".join(lines))


def _check_text_holds(file: BinaryIO, N: int, F: int, K: int, fail: _Failure) -> None:
    """A table that the file cannot hold is not made: a factor takes two bytes at least."""
    size = os.fstat(file.fileno()).st_size
    if size < N * F * K * 2:
        fail(
            f"{size} bytes are too few for {N} features, {F} fields and {K} factors; is it truncated?"
        )


def _read_vectors(
    file: BinaryIO, layer: FFMInteraction, prefix: str, first_line: int, fail: _Failure
) -> None:
    """The rest of a file, which :func:`_write_vectors` could have written, into the table."""
    form = prefix.encode()
    F, K = layer.num_fields, layer.embed_dim
    for begin, block in _row_blocks(layer, layer.weight):
        number = first_line + begin * F
        lines = list(islice(file, len(block) * F))
        factors = []
        for i, line in enumerate(lines):
            start = form % (begin + i // F, i % F)
            if not line.startswith(start):
                fail(f"line {number + i}: expected {_shown(start)}, found {_shown(line)}")
            factors.append(line[len(start) :])
        if len(lines) < len(block) * F or not lines[-1].endswith(b"\n"):
            fail(f"line {number + len(lines)}: the file ends too early; is it truncated?")
        numbers = _floats(factors, K)
        if numbers is None:
            for i, line in enumerate(factors):
                if _floats([line], K) is None:
                    fail(f"line {number + i}: expected {K} finite numbers, found {_shown(line)}")
        block[...] = np.reshape(numbers, block.shape)  # type: ignore[arg-type]
    line = file.readline()
    if line.strip():
        number = first_line + layer.num_features * F
        fail(f"line {number}: expected the end of the file, found {_shown(line)}")


def _floats(lines: list[bytes], count: int) -> np.ndarray | None:
    """The numbers of lines that have so many each, all finite."""
    words = [line.split() for line in lines]
    # NumPy reads 1_0 as Python does.
    if any(len(found) != count for found in words) or any(b"_" in line for line in lines):
        return None
    try:
        numbers = np.array(words, dtype=np.float32)
    except ValueError:
        return None
    return numbers if np.isfinite(numbers).all() else None


def _number(line: bytes, start: str, number: int, fail: _Failure) -> float:
    """The one number of a line that begins with ``start``."""
    numbers = _floats([line[len(start) :]], 1) if line.startswith(start.encode()) else None
    if numbers is None:
        fail(f"line {number}: expected '{start}<number>', found {_shown(line)}")
    return numbers.item()


def _shown(line: bytes) -> str:
    """The beginning of a line, for an error; of a file of another kind it may be anything."""
    text = line[:60].decode("ascii", "backslashreplace").rstrip("\r\n")
    return repr(text) + ("…" if len(line) > 60 else "")
