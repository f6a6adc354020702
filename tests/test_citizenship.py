# SPDX-License-Identifier: MIT
"""What people do with a module of PyTorch, done with ours. The marks make docs/compatibility.md."""

from __future__ import annotations

import copy
import io
import os
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import FORMS, OUTPUTS, Problem, by_definition, make_problem, python
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.func import functional_call, grad, jacrev, stack_module_state, vjp, vmap
from torch.nn.utils import parametrize
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

import ffm_ext
from ffm_ext import (
    FFM,
    FM,
    FFMInteraction,
    FieldAwareFactorizationMachine,
    SparseBatch,
    autograd,
    reference,
)
from ffm_ext.functional import ffm_interaction

N, F, K = 50, 3, 4
DENSE = ("dense", "atomic")
LEARNING = (*DENSE, "sparse", "fused")
ALL = (*LEARNING, "int8")
NEEDS_DENSE = "create_graph=True needs grad='dense'"
NOT_THE_OWN_TABLE = "the table is not the one that its fused optimizer updates"


def in_modes(
    feature: str,
    works: tuple[str, ...] = (),
    note: str | None = None,
    marks: Mapping[str, pytest.MarkDecorator] | None = None,
    **refused: str,
) -> pytest.MarkDecorator:
    """Runs a test once a mode: in those where it works, and in those where it is refused with the text given.

    ``marks`` are further ones of single modes.
    """
    options = {} if note is None else {"note": note}

    def param(mode: str, **more: str) -> Any:
        found = [pytest.mark.compatibility(feature, mode=mode, **options, **more)]
        if marks is not None and mode in marks:
            found.append(marks[mode])
        return pytest.param(mode, marks=found, id=mode)

    params = [param(mode) for mode in works]
    return pytest.mark.parametrize(
        "mode", [*params, *(param(mode, refuses=text) for mode, text in refused.items())]
    )


def optimizer() -> ffm_ext.optim.Optimizer:
    return ffm_ext.optim.Adam(lr=0.1)


def grad_of(mode: str) -> Any:
    return mode if mode in DENSE else "sparse"


def make_layer(mode: str, **options: Any) -> Any:
    layer = FFMInteraction(N, F, K, grad=grad_of(mode), **options)
    if mode == "fused":
        layer.fuse_optimizer(optimizer())
    return ffm_ext.quantize(layer) if mode == "int8" else layer


def make_model(mode: str, **options: Any) -> Any:
    """With a linear term and a bias, random ones."""
    model = FFM(K, num_features=N, num_fields=F, grad=grad_of(mode), **options)
    for parameter in model.linear.parameters():
        nn.init.normal_(parameter)
    if mode == "fused":
        model.interaction.fuse_optimizer(optimizer())
    return ffm_ext.quantize(model) if mode == "int8" else model


def ids(batch_size: int = 5) -> Tensor:
    return torch.randint(N, (batch_size, F))


def sparse_batch(batch_size: int, has_values: bool = True) -> SparseBatch:
    nnz = 4 * batch_size + 3
    offsets = torch.arange(batch_size + 1) * 4
    offsets[-1] = nnz
    values = torch.rand(nnz) if has_values else None
    return SparseBatch(torch.randint(N, (nnz,)), torch.randint(F, (nnz,)), values, offsets)


INPUTS: dict[str, Callable[[int], Tensor | SparseBatch]] = {
    "ids": ids,
    "batch": sparse_batch,
    "batch without values": lambda batch_size: sparse_batch(batch_size, has_values=False),
}


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    """Parameters, buffers and gradients."""
    wanted = dict(b.named_parameters())
    for name, parameter in a.named_parameters():
        g, w = parameter.grad, wanted[name].grad
        assert (g is None) == (w is None), name
        if g is not None and w is not None:
            assert g.layout == w.layout
            torch.testing.assert_close(g.to_dense(), w.to_dense())
    torch.testing.assert_close(a.state_dict(), b.state_dict())


# ---------------------------------------------------------------- torch.compile


needs_torch_2_12 = pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < "2.12",
    reason="torch.compile of a fused step needs torch 2.12",
)
learning = pytest.mark.parametrize(
    "mode", [*DENSE, "sparse", pytest.param("fused", marks=needs_torch_2_12)]
)


def compile_and_train(
    model: nn.Module, make: Callable[[int], Any], backend: str, dynamic: bool | None = True
) -> None:
    """Five sizes of batches and of learning rates; the state is that of the same model without compilation.

    One graph, or, where torch finds out that sizes change (``dynamic=None``), one before that and one for all others.
    """
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    other = copy.deepcopy(model)

    @torch.compile(fullgraph=True, dynamic=dynamic, backend=backend)
    def loss(x: Any) -> Tensor:
        return model(x).square().mean()

    for step, batch_size in enumerate((4, 9, 2, 17, 33)):
        x = make(batch_size)
        model.zero_grad()
        other.zero_grad()
        for module in (*model.modules(), *other.modules()):
            if getattr(module, "_fused", None) is not None:
                module._fused.param_groups[0]["lr"] = 0.1 / (step + 1)  # type: ignore[union-attr]
        loss(x).backward()
        other(x).square().mean().backward()
        assert_same_state(model, other)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (1 if dynamic else 2)


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "by default"])
@pytest.mark.parametrize("form", INPUTS)
@in_modes(
    "torch.compile, forward and backward",
    LEARNING,
    note="`fullgraph=True`, any batch size and learning rate in one graph; fused from torch 2.12 on",
    marks={"fused": needs_torch_2_12},
)
def test_compiled_training(mode: str, form: str, dynamic: bool | None) -> None:
    compile_and_train(make_model(mode), INPUTS[form], "aot_eager", dynamic)


@pytest.mark.parametrize("form", ["ids", "batch"])
@learning
def test_compiled_training_with_normalisation(mode: str, form: str) -> None:
    # Compiled, norms are rounded in another way, of which Adam makes steps of 0.1: float64 leaves nothing of that.
    model = make_model(mode, normalize=True, dtype=torch.float64)
    compile_and_train(model, INPUTS[form], "aot_eager")


@needs_torch_2_12
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_graphs_with_a_fused_layer_twice(backend: str) -> None:
    torch.compiler.reset()
    layer = make_layer("fused")
    loss = torch.compile(lambda x: layer(x).sum() * layer(x.flip(0)).sum(), backend=backend)
    for run in (loss, lambda x: layer(x).sum() * layer(x.flip(0)).sum()):
        with pytest.raises(
            RuntimeError, match=r"read the table before an update|inplace operation"
        ):
            run(ids()).backward()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_break_of_the_graph_leaves_the_package_alone() -> None:
    """Without ``capture_dynamic_output_shape_ops`` and ``fullgraph``, the graph breaks at a sparse layer."""
    torch.compiler.reset()
    model = nn.ModuleList([make_layer("sparse"), make_layer("fused")])
    other = copy.deepcopy(model)

    def loss(layers: nn.ModuleList, x: Tensor) -> Tensor:
        return sum(layer(x) for layer in layers).square().sum()

    compiled = torch.compile(loss, backend="aot_eager")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=False):
        for _ in range(3):
            x = ids()
            compiled(model, x).backward()
            loss(other, x).backward()
            assert_same_state(model, other)
    # What Dynamo has seen of the package by then is no part of another graph.
    last, counter = make_layer("dense", output="dot"), torch._dynamo.testing.CompileCounter()
    assert torch.compile(last, fullgraph=True, backend=counter)(ids()).shape == (5, F)
    assert (counter.frame_count, counter.op_count > 0) == (1, True)


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("mode", ["sparse", "fused"])
def test_compiled_layers_refuse_a_table_that_is_not_their_own(mode: str, fullgraph: bool) -> None:
    def compiled(function: Callable[..., Tensor]) -> Any:
        torch.compiler.reset()
        return torch.compile(function, fullgraph=fullgraph, backend="aot_eager")

    # RuntimeError, or with fullgraph what Dynamo makes of it.
    layer, x = make_layer(mode), ids()
    if mode == "fused":
        weight = nn.Parameter(layer.weight.detach().clone())
        run = compiled(lambda w, x: functional_call(layer, {"weight": w}, (x,)).sum())
        with pytest.raises(RuntimeError, match=NOT_THE_OWN_TABLE):
            run(weight, x)
    parametrize.register_parametrization(layer, "weight", Masked())
    with pytest.raises(RuntimeError, match=COMPUTED):
        compiled(layer)(x)


@pytest.mark.parametrize(
    "model",
    [FFM(K, num_features=N, num_fields=F), FM(N, K)],
    ids=lambda model: type(model).__name__,
)
def test_compiled_batches_of_one_sample_and_of_one_entry(model: nn.Module) -> None:
    # Inductor stops at index_add into one row, and has a wrong sparse gradient of one lookup.
    torch.compiler.reset()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    compiled = torch.compile(model)
    for counts in ([3, 1], [5], [1], [0, 1]):
        x = ids(sum(counts))
        offsets = torch.tensor([0, *counts]).cumsum(0)
        batch = SparseBatch(x[:, 0].clone(), x[:, 1] % F, torch.randn(len(x)), offsets)
        found = []
        for run in (model, compiled):
            model.zero_grad()
            scores = run(batch)
            (scores * torch.arange(1, len(scores) + 1)).sum().backward()
            grads = [p.grad.to_dense().clone() for p in model.parameters() if p.grad is not None]
            found.append([scores.detach(), *grads])
        torch.testing.assert_close(found[1], found[0])


@pytest.mark.slow
@pytest.mark.parametrize("form", INPUTS)
@learning
def test_compiled_training_by_inductor(mode: str, form: str) -> None:
    compile_and_train(make_model(mode), INPUTS[form], "inductor")


@pytest.mark.parametrize("form", ["ids", "batch"])
@in_modes(
    "torch.compile, whole step with `optimizer.step()`",
    LEARNING,
    note='torch breaks the graph at `backward`, and with `grad="sparse"` at the layer too',
    marks={"fused": needs_torch_2_12},
)
def test_compiled_step(mode: str, form: str) -> None:
    torch.compiler.reset()
    model = make_model(mode)
    models = model, copy.deepcopy(model)
    optimizers = [
        torch.optim.SGD(
            [p for p in m.parameters() if mode != "fused" or p is not m.interaction.weight], lr=0.1
        )
        for m in models
    ]

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Any) -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    compiled = torch.compile(step, backend="aot_eager")
    before = model.interaction.weight.detach().clone()
    for batch_size in (4, 9, 2):
        x = INPUTS[form](batch_size)
        found, wanted = (run(m, o, x) for run, m, o in zip((compiled, step), models, optimizers))
        torch.testing.assert_close(found, wanted)
        assert_same_state(*models)
    assert not torch.equal(model.interaction.weight, before)


@pytest.mark.parametrize("form", ["ids", "batch"])
@in_modes("torch.compile, inference", ALL, note="`fullgraph=True`, one graph")
def test_compiled_inference(mode: str, form: str) -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = make_model(mode)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for batch_size in (4, 9, 2, 33):
            x = INPUTS[form](batch_size)
            torch.testing.assert_close(compiled(x), model(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_torch_before_2_12_compiles_no_fused_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autograd, "_TRACES_UPDATES", False)
    torch.compiler.reset()
    layer = make_layer("fused")
    loss = torch.compile(lambda x: layer(x).sum(), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"fused optimizer needs torch 2\.12 or newer, this is"):
        loss(ids())


@needs_torch_2_12
def test_a_compiled_graph_older_than_its_table_is_noticed() -> None:
    torch.compiler.reset()
    layer = make_layer("fused")
    loss = torch.compile(lambda x: layer(x).sum(), fullgraph=True, backend="aot_eager")
    first, second = loss(ids()), loss(ids())
    first.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


@in_modes(
    "double backward under torch.compile",
    **dict.fromkeys(DENSE, "does not currently support double backward"),
)
def test_compiled_double_backward(mode: str) -> None:
    torch.compiler.reset()
    layer = make_layer(mode)
    loss = torch.compile(lambda x: layer(x).square().sum(), backend="aot_eager")
    (first,) = torch.autograd.grad(loss(ids()), layer.weight, create_graph=True)
    first.sum().backward()


# ---------------------------------------------------------------- torch.export


@pytest.mark.parametrize("form", ["ids", "batch"])
@in_modes("torch.export", ALL, note="for inference: the program has no gradients")
def test_export(mode: str, form: str) -> None:
    model = make_model(mode).eval()
    entries, ends = torch.export.Dim("entries"), torch.export.Dim("ends", min=3)
    shapes: Any = {0: torch.export.Dim("B", min=2)}
    if form == "batch":
        shapes = [{0: entries}, {0: entries}, {0: entries}, {0: ends}]
    program = torch.export.export(model, (INPUTS[form](3),), dynamic_shapes={"x": shapes})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch_size in (3, 2, 8):
        x = INPUTS[form](batch_size)
        torch.testing.assert_close(loaded(x), model(x))


# ---------------------------------------------------------------- autocast


@in_modes("autocast", ALL, note="the table keeps its dtype, sums and result too")
def test_autocast(mode: str, device: torch.device) -> None:
    model = make_model(mode).to(device)
    x, values = ids().to(device), torch.rand(5, F, dtype=torch.bfloat16, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = model(x, values)
        assert found.dtype == torch.float32
        assert nn.Linear(5, 2, device=device)(found).dtype == torch.bfloat16
    torch.testing.assert_close(found, model(x, values))


@pytest.mark.parametrize("mode", LEARNING)
def test_training_under_autocast(mode: str, device: torch.device) -> None:
    """A head in bfloat16 behind the layer: the gradient of the table is float32, and that of the head's gradient."""
    layer, head = make_layer(mode, output="dot").to(device), nn.Linear(3, 1, device=device)
    x, before = ids().to(device), layer.weight.detach().clone()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = layer(x)
        out.retain_grad()
        loss = head(out).square().mean()
    loss.backward()
    if mode == "fused":
        assert not torch.equal(layer.weight, before)
        return
    expected = torch.autograd.grad(layer(x), layer.weight, out.grad)[0]
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(layer.weight.grad.to_dense(), expected.to_dense())


@in_modes("torch.amp.GradScaler", (*DENSE, "sparse"), fused="the loss was scaled by a GradScaler")
def test_grad_scaler(mode: str, device: torch.device) -> None:
    layer = make_layer(mode).to(device)
    other = copy.deepcopy(layer)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    x = ids().to(device)
    step = layer._fused or torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler.scale(layer(x).square().sum()).backward()
    scaler.step(step)
    scaler.update()
    other(x).square().sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    torch.testing.assert_close(layer.weight, other.weight)


# ---------------------------------------------------------------- torch.func


@in_modes("torch.func.functional_call", ALL)
def test_functional_call(mode: str) -> None:
    layer, other = make_layer(mode), make_layer(mode)
    x = ids()
    found = functional_call(layer, dict(other.state_dict()), (x,))
    torch.testing.assert_close(found, other(x))
    if mode in (*DENSE, "sparse"):
        weight = other.weight.detach().clone().requires_grad_()
        functional_call(layer, {"weight": weight}, (x,)).sum().backward()
        other(x).sum().backward()
        torch.testing.assert_close(weight.grad.to_dense(), other.weight.grad.to_dense())
        assert layer.weight.grad is None


@pytest.mark.parametrize("form", FORMS)
@in_modes("torch.func.grad, vjp, jacrev", DENSE, sparse=NEEDS_DENSE)
def test_func_gradients(mode: str, form: str) -> None:
    problem = make_problem(form, F, K, dtype=torch.float64)
    inputs = (problem.weight, problem.values)
    argnums = (0,) if problem.values is None else (0, 1)
    seed = torch.randn(problem.batch_size, dtype=torch.float64)

    def ours(weight: Tensor, values: Tensor | None) -> Tensor:
        return ffm_interaction(weight, *with_values(problem, values), grad=mode)  # type: ignore[arg-type]

    def plain(weight: Tensor, values: Tensor | None) -> Tensor:
        return reference.ffm_interaction(weight, *with_values(problem, values), grad="dense")

    def gradients(f: Callable[..., Tensor]) -> list[Any]:
        def second(*a: Tensor) -> Any:
            return jacrev(lambda *a: f(*a)[3], argnums)(*a)

        return [
            grad(lambda *a: (f(*a) * seed).sum(), argnums)(*inputs),
            jacrev(f, argnums)(*inputs),
            vjp(lambda weight: f(weight, problem.values), problem.weight)[1](seed),
            jacrev(second, argnums)(*inputs),
        ]

    torch.testing.assert_close(gradients(ours), gradients(plain))


@in_modes("torch.func.grad, vjp, jacrev", fused=NOT_THE_OWN_TABLE)
def test_func_gradients_of_a_fused_layer(mode: str) -> None:
    layer, x = make_layer(mode), ids()
    grad(lambda weight: functional_call(layer, {"weight": weight}, (x,)).sum())(
        layer.weight.detach()
    )


def with_values(problem: Problem, values: Tensor | None) -> tuple[Tensor | None, ...]:
    return problem.indices, problem.fields, values, problem.offsets  # type: ignore[return-value]


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("values_grad", [True, False])
def test_vmap_of_the_operator_of_gradients(values_grad: bool, deterministic: bool) -> None:
    problem = make_problem("one-hot values", F, K)
    seeds = torch.randn(2, problem.batch_size)

    def gradients(seed: Tensor) -> tuple[Tensor, ...]:
        args = (seed, *problem.args, "sum", False, values_grad)
        found = torch.ops.ffm_ext.ffm_backward(*args, deterministic=deterministic)
        return tuple(found if values_grad else found[:1])

    wanted = tuple(torch.stack(parts) for parts in zip(*map(gradients, seeds)))
    torch.testing.assert_close(vmap(gradients)(seeds), wanted)


@in_modes("torch.func.vmap", ALL, note="by one call for all, also over several tables")
@pytest.mark.filterwarnings("error:There is a performance drop")
def test_vmap(mode: str) -> None:
    layer, x = make_layer(mode), torch.stack([ids() for _ in range(4)])
    torch.testing.assert_close(vmap(layer)(x), torch.stack([layer(i) for i in x]))


@pytest.mark.filterwarnings("error:There is a performance drop")
@pytest.mark.parametrize("batched", ["ids", "table", "table and ids", "values"])
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("form", FORMS)
def test_vmap_of_a_gradient(form: str, output: str, batched: str) -> None:
    problem = make_problem(form, F, K, dtype=torch.float64)
    if batched == "values" and problem.values is None:
        return

    def stack(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, tensor.flip(0)])

    args = list(problem.args)
    dims: list[int | None] = [None] * 5
    for i, name in ((0, "table"), (1, "ids"), (3, "values")):
        if name in batched:
            args[i], dims[i] = stack(args[i]), 0  # type: ignore[arg-type]

    def loss(interaction: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *a: (
            interaction(*a, output=output, within_field=True, grad="dense").square().sum()
        )

    argnums = (0,) if problem.values is None else (0, 3)
    found = vmap(grad(loss(ffm_interaction), argnums), tuple(dims))(*args)
    single = [[a if d is None else a[v] for a, d in zip(args, dims)] for v in range(2)]  # type: ignore[index]
    wanted = [grad(loss(reference.ffm_interaction), argnums)(*a) for a in single]
    torch.testing.assert_close(found, tuple(torch.stack(parts) for parts in zip(*wanted)))


@in_modes(
    "vmap of a gradient (one gradient a sample)",
    DENSE,
    sparse=NEEDS_DENSE,
    fused=NOT_THE_OWN_TABLE,
)
def test_gradient_of_each_sample(mode: str) -> None:
    layer, x = make_layer(mode), ids()

    def loss(weight: Tensor, sample: Tensor) -> Tensor:
        return functional_call(layer, {"weight": weight}, (sample[None],)).square().sum()

    found = vmap(grad(loss), (None, 0))(layer.weight.detach(), x)
    for sample, gradient in zip(x, found):
        (wanted,) = torch.autograd.grad(layer(sample[None]).square().sum(), layer.weight)
        torch.testing.assert_close(gradient, wanted)


# Each looks at what it is given before its layer does.
MODELS = (
    FFM(K, field_dims=[5] * F, grad="dense"),
    FFM(K, num_features=5 * F, num_fields=F, normalize=True, grad="dense"),
    FM(5 * F, K, grad="dense"),
    FieldAwareFactorizationMachine([5] * F, K, grad="dense"),
)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("has_values", [False, True])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)
def test_vmap_of_models(model: nn.Module, has_values: bool) -> None:
    if has_values and isinstance(model, FieldAwareFactorizationMachine):
        return
    batch = (torch.randint(5, (7, F)), *([torch.rand(7, F)] if has_values else []))
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def score(parameters: dict[str, Tensor], *sample: Tensor) -> Tensor:
        return functional_call(model, parameters, tuple(x[None] for x in sample)).sum()

    dims = (None, *[0] * len(batch))
    scores = torch.stack([model(*(x[b : b + 1] for x in batch)).sum() for b in range(7)])
    torch.testing.assert_close(vmap(score, dims)(parameters, *batch), scores)
    found = vmap(grad(score), dims)(parameters, *batch)
    for b in range(7):
        wanted = torch.autograd.grad(scores[b], tuple(model.parameters()), retain_graph=True)
        for gradient, (name, _) in zip(wanted, model.named_parameters()):
            torch.testing.assert_close(found[name][b], gradient)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)
def test_gradients_of_an_ensemble(model: nn.Module) -> None:
    models = [copy.deepcopy(model) for _ in range(3)]
    for one in models:
        for parameter in one.parameters():
            nn.init.normal_(parameter)
    parameters, buffers = stack_module_state(models)
    x = torch.randint(5, (7, F))

    def score(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(model, (parameters, buffers), (x,))

    scores = torch.stack([one(x) for one in models])
    found = vmap(score)(parameters, buffers)
    torch.testing.assert_close(found, scores)
    found.sum().backward()
    scores.sum().backward()
    for name, parameter in parameters.items():
        wanted = torch.stack([one.get_parameter(name).grad for one in models])  # type: ignore[misc]
        torch.testing.assert_close(parameter.grad, wanted)


def test_gradients_of_what_vmap_is_given() -> None:
    table, x = torch.randn(N, F, K), ids()
    values = torch.rand(2, *x.shape, requires_grad=True)

    def interaction(values: Tensor) -> Tensor:
        return ffm_interaction(table, x, values=values, grad="dense")

    (found,) = torch.autograd.grad(vmap(interaction)(values).sum(), values)
    (wanted,) = torch.autograd.grad(torch.stack([interaction(v) for v in values]).sum(), values)
    torch.testing.assert_close(found, wanted)
    tables = torch.randn(2, N, F, K, requires_grad=True)
    scores = vmap(lambda table: ffm_interaction(table, x, grad="sparse"))(tables)
    with pytest.raises(RuntimeError, match="need grad='dense', this is grad='sparse'"):
        scores.sum().backward()


def test_batched_gradients() -> None:
    seeds = torch.eye(5)
    layer = make_layer("dense")
    y = layer(ids())
    (found,) = torch.autograd.grad(y, layer.weight, seeds, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(y, layer.weight, seed, retain_graph=True)[0] for seed in seeds]
    torch.testing.assert_close(found, torch.stack(each))
    for mode in ("sparse", "fused"):
        layer = make_layer(mode)
        with pytest.raises(RuntimeError, match=f"is_grads_batched=True need grad='dense'.*{mode}"):
            torch.autograd.grad(layer(ids()), layer.weight, seeds, is_grads_batched=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_to_be_differentiated_are_summed_in_float32(dtype: torch.dtype) -> None:
    table = torch.ones(4, 2, 2, dtype=dtype, requires_grad=True)
    score = ffm_interaction(table, torch.tensor([[0, 1]]).repeat(4096, 1), grad="dense").sum()
    (gradient,) = torch.autograd.grad(score, table, create_graph=True)
    assert gradient.dtype == dtype
    assert gradient[0, 1].tolist() == [4096, 4096]


def test_vmap_refuses_ids_of_the_next_table_and_offsets_that_do_not_fit() -> None:
    tables, x = torch.randn(3, 10, F, K), torch.randint(10, (3, 1, F))
    x[1, 0, 1] = 10
    with pytest.raises(
        IndexError, match=r"indices\[1, 0, 1\] = 10 is out of range for a table of 10"
    ):
        vmap(ffm_interaction)(tables, x)
    indices, fields = torch.randint(10, (4,)), torch.tensor([0, 1, 0, 1])

    def interaction(table: Tensor, offsets: Tensor) -> Tensor:
        return ffm_interaction(table, indices, fields, None, offsets)

    good = torch.tensor([0, 2, 4]).repeat(3, 1)
    wanted = torch.stack([interaction(table, good[0]) for table in tables])
    torch.testing.assert_close(vmap(interaction)(tables, good), wanted)
    for at, bad, text in (
        (0, 1, "offsets[0] = 1 must be 0"),
        (1, 5, "offsets[2] = 4 is less than offsets[1] = 5"),
        (2, 3, "offsets[2] = 3 must be the number of entries, 4"),
    ):
        offsets = good.clone()
        offsets[1, at] = bad
        for given, dims in ((offsets, (0, 0)), (offsets[1], (0, None))):
            with pytest.raises(ValueError, match=re.escape(text)):
                vmap(interaction, dims)(tables, given)


@pytest.mark.parametrize("program", ["eager", "compiled", "exported"])
@pytest.mark.parametrize("model", [MODELS[0], MODELS[3]], ids=lambda model: type(model).__name__)
def test_an_id_past_the_end_of_its_field_is_refused(model: nn.Module, program: str) -> None:
    """It would be a good id of the next field."""
    torch.compiler.reset()
    x = torch.randint(5, (7, F))
    run: Callable[..., Tensor] = model
    if program == "compiled":
        run = torch.compile(model, fullgraph=True, backend="aot_eager")
    elif program == "exported":
        run = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(run(x), model(x))
    x[3, 0] = 5
    with pytest.raises(IndexError, match=r"indices\[3, 0\] = 5 is out of range for field 0 of 5"):
        run(x)


@in_modes(
    "forward-mode derivatives (jvp, jacfwd, hessian)",
    **dict.fromkeys(LEARNING, "no forward-mode derivatives"),
)
def test_forward_mode(mode: str) -> None:
    layer, x = make_layer(mode), ids()
    weight = layer.weight.detach()
    torch.func.jvp(lambda w: functional_call(layer, {"weight": w}, (x,)), (weight,), (weight,))


def test_forward_mode_elsewhere_is_no_matter() -> None:
    layer, x = make_layer("dense"), ids()

    def function(scale: Tensor) -> Tensor:
        return layer(x).detach() * scale

    _, tangent = torch.func.jvp(function, (torch.ones(5),), (torch.ones(5),))
    torch.testing.assert_close(tangent, layer(x))


@in_modes("double backward", DENSE, sparse=NEEDS_DENSE, fused=NOT_THE_OWN_TABLE)
def test_double_backward(mode: str) -> None:
    """Third derivatives too, and that of the gradient that flows in. gradgradcheck is in test_gradients.py."""
    problem = make_problem("one-hot", F, K, num_features=N, dtype=torch.float64)
    layer = make_layer(mode).double()
    seed = torch.randn(7, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (
        lambda w: functional_call(layer, {"weight": w}, (problem.indices,)),
        lambda w: by_definition(
            w.view(N, F, K), *problem.args[1:], output="sum", within_field=False
        ),
    ):
        weight = layer.weight.detach().clone().requires_grad_()
        (first,) = torch.autograd.grad(function(weight).pow(3), weight, seed, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), (weight, seed), create_graph=True)
        third = torch.autograd.grad(second[0].sum() + second[1].sum(), (weight, seed))
        results.append((first, *second, *third))
    torch.testing.assert_close(*results)


# ---------------------------------------------------------------- copies and files


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_state_dict(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def assigned(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    other.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    return other


all_copies = pytest.mark.parametrize(
    "copied", [copy.deepcopy, pickled, through_a_file, by_state_dict, assigned]
)


@all_copies
@in_modes("copy.deepcopy, pickle, torch.save, state_dict", ALL)
def test_a_copy_goes_on_as_the_original(
    mode: str, copied: Callable[[nn.Module], nn.Module]
) -> None:
    model = make_model(mode)
    x = ids()
    if mode != "int8":
        model(x).sum().backward()
        model.zero_grad()
    other = copied(model)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    if mode == "int8":
        return
    other(x).square().sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    model(x).square().sum().backward()
    assert_same_state(other, model)
    if mode == "sparse":
        assert other.interaction.weight.grad.is_coalesced()
    if mode == "fused":
        # The copy's handle is the copy's own.
        other.interaction._fused.param_groups[0]["lr"] = 0.7
        assert model.interaction._fused.param_groups[0]["lr"] == 0.1
        before = model.interaction.weight.detach().clone()
        other(x).sum().backward()
        assert torch.equal(model.interaction.weight, before)
        assert not torch.equal(other.interaction.weight, before)


@all_copies
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        (name, mode)
        for name in ("FM", "drop-in")
        for mode in LEARNING
        if (name, mode) != ("FM", "fused")
    ],
)
def test_a_copy_of_the_other_models_goes_on(
    name: str, mode: str, copied: Callable[[nn.Module], nn.Module]
) -> None:
    model = MODELS[name](grad=grad_of(mode))
    if mode == "fused":
        model.interaction.fuse_optimizer(optimizer())  # type: ignore[operator, union-attr]
    x = torch.randint(2, (5, F))
    model(x).sum().backward()
    model.zero_grad()
    other = copied(model)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    other(x).square().sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    model(x).square().sum().backward()
    assert_same_state(other, model)


# ---------------------------------------------------------------- hooks, parametrizations, memory


@in_modes("forward and backward hooks", LEARNING)
def test_hooks(mode: str) -> None:
    layer, seen = make_layer(mode), []
    layer.register_forward_pre_hook(lambda module, args: (args[0].flip(0),))
    layer.register_forward_hook(lambda module, args, out: out * 2)
    layer.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_out[0]))
    layer.weight.register_hook(lambda g: None if g is None else seen.append(g))
    x = ids()
    expected = 2 * FFMInteraction.forward(layer, x.flip(0))
    out = layer(x)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    torch.testing.assert_close(seen[0], torch.ones(5))
    # In the fused mode the table has no gradient.
    assert len(seen) == (1 if mode == "fused" else 2)


class Masked(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * (torch.arange(N) % 2)[:, None]


COMPUTED = "weight is computed from another tensor"


@in_modes("torch.nn.utils.parametrize", DENSE, sparse=COMPUTED, fused=COMPUTED)
def test_parametrize(mode: str) -> None:
    x = ids(64)  # some samples have two odd ids, which alone have a gradient
    layer, other = make_layer(mode), make_layer(mode)
    parametrize.register_parametrization(layer, "weight", Masked())
    layer(x).sum().backward()
    gradient = layer.parametrizations.weight.original.grad
    assert (gradient[::2] == 0).all()
    assert gradient[1::2].any()
    torch.nn.utils.parametrizations.weight_norm(other, "weight")
    other(x).sum().backward()
    assert all(parameter.grad is not None for parameter in other.parameters())


def test_a_parametrized_table_takes_no_fused_optimizer() -> None:
    layer = make_layer("dense")
    parametrize.register_parametrization(layer, "weight", Masked())
    with pytest.raises(
        RuntimeError, match=r"FFMInteraction\.fuse_optimizer: weight is parametrized"
    ):
        layer.fuse_optimizer(optimizer())


@pytest.mark.parametrize("decay", [0.9, 0.9995])
def test_averaged_models(decay: float) -> None:
    """With ``use_buffers`` torch averages integers as well, and truncates them."""
    dims = [943, 1682, 8, 2, 21]
    model = FFM(K, field_dims=dims, grad="dense")
    average = swa_utils.AveragedModel(
        model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay), use_buffers=True
    )
    for _ in range(5):
        average.update_parameters(model)
    x = torch.tensor([[n - 1 for n in dims]])
    torch.testing.assert_close(average(x), model(x), rtol=1e-4, atol=1e-5)


def test_states_of_optimizers_for_distributed_checkpoints() -> None:
    model = make_model("sparse")
    handle = model.interaction.fuse_optimizer(optimizer())
    rest = torch.optim.Adam(model.linear.parameters())
    _, states = get_state_dict(model, [rest, handle])
    assert states["param_groups"][1]["params"] == ["interaction.weight"]  # type: ignore[index]
    assert model.interaction.weight.grad is None
    before = model.interaction.weight.detach().clone()
    model(ids()).sum().backward()
    handle.step()
    assert not torch.equal(model.interaction.weight, before)
    # A gradient that nothing would apply is noticed still, until it is taken away.
    model.interaction.weight.square().sum().backward()
    with pytest.raises(RuntimeError, match="a gradient from elsewhere"):
        handle.step()
    handle.zero_grad()
    handle.step()


@pytest.mark.parametrize("reentrant", [False, True])
@in_modes("torch.utils.checkpoint", LEARNING)
def test_gradient_checkpointing(mode: str, reentrant: bool) -> None:
    layer = make_layer(mode)
    other = copy.deepcopy(layer)
    x, values = ids(), torch.rand(5, F, requires_grad=True)
    checkpoint(lambda *a: layer(*a).square(), x, values, use_reentrant=reentrant).sum().backward()
    other(x, values).square().sum().backward()
    assert_same_state(layer, other)


# ---------------------------------------------------------------- construction


MODELS: dict[str, Callable[..., nn.Module]] = {
    "FFMInteraction": lambda **k: FFMInteraction(13, 3, 4, **k),
    "FFM of sizes": lambda **k: FFM(4, field_dims=[4, 7, 2], **k),
    "FFM of ids": lambda **k: FFM(
        4, fields={"a": [0, 1, 12], "b": range(2, 10), "c": [10, 11]}, **k
    ),
    "FM": lambda **k: FM(13, 4, **k),
    "drop-in": lambda **k: FieldAwareFactorizationMachine([4, 7, 2], 4, **k),
}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_buffers())


META = "meta device, to_empty, reset_parameters"


@pytest.mark.compatibility(META, mode=(*DENSE, "sparse"))
@pytest.mark.parametrize("name", MODELS)
def test_meta_device(name: str) -> None:
    make = MODELS[name]
    with torch.device("meta"):
        model = make()
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    shell = nn.ModuleDict({"inner": model}).to_empty(device="cpu")
    for parameter in shell.parameters():
        nn.init.constant_(parameter, float("nan"))
    for module in shell.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.reset_parameters()  # type: ignore[operator]
    other = make()
    for one in (model, other):
        torch.manual_seed(0)
        one.reset_parameters()  # type: ignore[operator]
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(buffers(model), buffers(other))
    x = torch.randint(2, (5, 3))
    torch.testing.assert_close(model(x), other(x))


@pytest.mark.parametrize("name", ["FFMInteraction", "FFM of sizes", "drop-in"])
@pytest.mark.parametrize("fused", [optimizer(), ffm_ext.optim.FTRL(lr=0.1)])
@pytest.mark.parametrize("way", ["to_empty", "load_state_dict(assign=True)"])
@pytest.mark.compatibility(META, mode="fused")
def test_meta_device_of_a_fused_layer(name: str, fused: ffm_ext.optim.Optimizer, way: str) -> None:
    """Its state comes to life with the table, from which that of FTRL is reckoned."""

    def make(device: str) -> tuple[nn.Module, ffm_ext.optim.FusedOptimizer]:
        with torch.device(device):
            model = MODELS[name]()
            layer = model if isinstance(model, FFMInteraction) else model.interaction
            return model, layer.fuse_optimizer(fused)  # type: ignore[operator, union-attr]

    model, handle = make("meta")
    other, _ = make("cpu")
    real = [name for name, tensor in model.state_dict().items() if not tensor.is_meta]
    assert [name.split(".")[-1] for name in real] == ["optimizer_step"]  # which is read on the CPU
    if way == "to_empty":
        model.to_empty(device="cpu")
        for tensor in model.state_dict().values():
            tensor.fill_(-1)
        for one in (model, other):
            torch.manual_seed(0)
            one.reset_parameters()  # type: ignore[operator]
    else:
        model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)
    handle.param_groups[0]["lr"] = 0.1
    for _ in range(2):
        x = torch.randint(2, (5, 3))
        for one in (model, other):
            one(x).square().sum().backward()
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.compatibility("torch.nn.utils.skip_init", mode=(*DENSE, "sparse"))
@pytest.mark.parametrize("name", MODELS)
def test_deferred_initialisation(name: str) -> None:
    other = MODELS[name]()

    class Deferred(nn.Module):
        def __new__(cls, device: str = "cpu") -> Any:
            return MODELS[name](device=device)

        def __init__(self, device: str = "cpu") -> None: ...

    model = torch.nn.utils.skip_init(Deferred)
    model.load_state_dict(other.state_dict())
    x = torch.randint(2, (5, 3))
    torch.testing.assert_close(model(x), other(x))
    torch.testing.assert_close(buffers(model), buffers(other))


@pytest.mark.parametrize("name", MODELS)
def test_dtype_of_a_new_module(name: str) -> None:
    model = MODELS[name](dtype=torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


# ---------------------------------------------------------------- the rest


@in_modes("torch.profiler", LEARNING, note="the operators have their names in it")
def test_profiler(mode: str) -> None:
    layer = make_layer(mode)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(ids()).sum().backward()
    names = {event.key for event in profile.key_averages()}
    backward = {
        "dense": "ffm_backward",
        "atomic": "ffm_backward",
        "sparse": "ffm_backward_sparse",
        "fused": "ffm_backward_fused_",
    }
    assert {"ffm_ext::ffm_forward", f"ffm_ext::{backward[mode]}"} <= names


TORCHSCRIPT = "TorchScript cannot compile it. torch.export and AOTInductor take its place"


@in_modes("torch.jit.script", **dict.fromkeys(ALL, TORCHSCRIPT))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript(mode: str) -> None:
    torch.jit.script(make_model(mode))


@pytest.mark.compatibility(
    "torch.jit.trace", mode=ALL, note="for inference; ids and offsets of any number of samples"
)
@pytest.mark.parametrize("mode", ALL)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traced_programs_are_for_any_batch(mode: str) -> None:
    class Traced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model(mode)
            self.other = ffm_ext.FM(N, 4, grad="dense")

        def forward(self, *lists: Tensor) -> Tensor:
            batch = SparseBatch(*lists)
            return self.model(batch) + self.other(batch)

    def lists(batch: SparseBatch) -> tuple[Tensor, ...]:
        assert batch.values is not None
        return batch.indices, batch.fields, batch.values, batch.offsets

    model = Traced()
    with torch.no_grad():
        traced = torch.jit.trace(model, lists(sparse_batch(1)))
        for B in (1, 4):
            given = lists(sparse_batch(B))
            torch.testing.assert_close(traced(*given), model(*given))


def test_nothing_that_a_subclass_computes_is_lost_in_silence(tmp_path: Path) -> None:
    class DeepFFM(FFM):
        def forward(self, *arguments: Any, **named: Any) -> Tensor:
            return 2 * super().forward(*arguments, **named)

    class Gated(ffm_ext.FFMInteraction):
        def forward(self, *arguments: Any, **named: Any) -> Tensor:
            return 2 * super().forward(*arguments, **named)

    class Richer(FFM):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.tower = nn.Linear(3, 1)

    gated = FFM(4, num_features=9, num_fields=3)
    gated.interaction = Gated(9, 3, 4)
    for model, what in (
        (DeepFFM(4, num_features=9, num_fields=3), r"DeepFFM has forward\(\) of its own"),
        (Richer(4, num_features=9, num_fields=3), r"Richer has tower\.weight"),
        (gated, r"Gated has forward\(\) of its own"),
    ):
        with pytest.raises(TypeError, match=f"Trainer: {what}"):
            ffm_ext.training.Trainer(model)
        with pytest.raises(TypeError, match=f"save_model: {what}"):
            ffm_ext.interop.save_model(model, tmp_path / "model")
    with pytest.raises(TypeError, match=r"quantize: Gated has forward\(\) of its own"):
        ffm_ext.quantize(nn.Sequential(Gated(9, 3, 4)))
    # A module that holds one is fine, and so are hooks.
    seen: list[Tensor] = []
    layer = ffm_ext.FFMInteraction(9, 3, 4)
    layer.register_forward_hook(lambda module, given, out: seen.append(out))
    x = torch.randint(9, (5, 3))
    found = ffm_ext.quantize(nn.Sequential(layer))(x)
    assert seen[-1] is found


def test_the_gradient_of_a_layer_that_shares_a_fused_table_is_not_dropped() -> None:
    x = torch.randint(9, (5, 3))
    fused, other = (ffm_ext.FFMInteraction(9, 3, 4) for _ in range(2))
    other.weight = fused.weight
    handle = fused.fuse_optimizer(ffm_ext.optim.AdaGrad(lr=0.1))
    (fused(x).sum() + other(x).sum()).backward()
    with pytest.raises(
        RuntimeError, match="FFMInteraction: the table has a gradient from elsewhere"
    ):
        fused(x)
    with pytest.raises(RuntimeError, match=r"FusedOptimizer\.step: the table has a gradient from"):
        handle.step()
    fused.weight.grad = None
    fused(x).sum().backward()


def test_models_without_memory_can_be_made_and_described() -> None:
    with FakeTensorMode():
        for model in (
            FFM(4, field_dims=[10, 20]),
            FFM(4, fields={"a": 10, "b": 20}),
            ffm_ext.FieldAwareFactorizationMachine([10, 20], 4),
        ):
            assert model.state_dict()


def test_weights_that_come_one_by_one() -> None:
    """As `accelerate.load_checkpoint_and_dispatch` puts them in, without `load_state_dict`."""
    wanted = FFM(4, field_dims=[10, 20])
    with torch.device("meta"):
        model = FFM(4, field_dims=[10, 20])
    for name, tensor in wanted.state_dict().items():
        place, _, last = name.rpartition(".")
        model.get_submodule(place)._parameters[last] = nn.Parameter(tensor)
    x = torch.tensor([[9, 19], [0, 3]])
    assert torch.equal(model(x), wanted(x))


def test_a_batch_is_a_pytree() -> None:
    batch = sparse_batch(3)
    leaves, spec = torch.utils._pytree.tree_flatten(batch)
    assert [id(leaf) for leaf in leaves] == [
        id(getattr(batch, n)) for n in ("indices", "fields", "values", "offsets")
    ]
    other = torch.utils._pytree.tree_map_only(Tensor, torch.clone, batch)
    assert isinstance(other, SparseBatch)
    assert torch.equal(other.offsets, batch.offsets)
    assert torch.utils._pytree.tree_unflatten(leaves, spec).values is batch.values


def test_a_batch_is_saved_with_tensors() -> None:
    batch, file = sparse_batch(3), io.BytesIO()
    torch.save({"batch": batch}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["batch"]
    for name in ("indices", "fields", "values", "offsets"):
        assert torch.equal(getattr(loaded, name), getattr(batch, name))


# ---------------------------------------------------------------- the page


@pytest.mark.parametrize(
    ("mark", "strict", "passes"), [("", "0", True), ("", "1", False), ("on='a GPU'", "1", True)]
)
def test_what_the_page_cites_has_to_run(
    mark: str, strict: str, passes: bool, tmp_path: Path
) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        f"@pytest.mark.compatibility('a feature', mode='dense', {mark})\n"
        "@pytest.mark.skip(reason='not here')\n"
        "def test_it(): ...\n"
        "@pytest.mark.skip(reason='not cited')\n"
        "def test_other(): ...\n"
    )
    tests = Path(__file__).parent
    run = python(
        *("-m", "pytest", "-p", "conftest", f"--rootdir={tmp_path}", str(tmp_path)),
        FFM_EXT_STRICT=strict,
        PYTHONPATH=os.pathsep.join([str(tests), str(tests.parent)]),
    )
    assert (run.returncode == 0) == passes, run.stdout + run.stderr
    assert ("cites this test, and it did not run: Skipped: not here" in run.stdout) != passes


def test_slow_tests_end_with_the_deadline(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.mark.slow\n"
        "def test_slow(): ...\n"
        "@pytest.mark.slow\n"
        "@pytest.mark.compatibility('a feature', mode='dense', group='a group')\n"
        "def test_cited(): ...\n"
        "def test_quick(): ...\n"
    )
    tests = Path(__file__).parent
    for deadline, passed, skipped in (("1", 2, 1), ("1e12", 3, 0)):
        run = python(
            *("-m", "pytest", "-ra", "-p", "conftest", f"--rootdir={tmp_path}", str(tmp_path)),
            FFM_EXT_DEADLINE=deadline,
            PYTHONPATH=os.pathsep.join([str(tests), str(tests.parent)]),
        )
        assert f"{passed} passed" in run.stdout, run.stdout + run.stderr
        assert run.stdout.count("no time is left") == skipped
