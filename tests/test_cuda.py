# SPDX-License-Identifier: MIT
"""What only a CUDA device shows: streams, graphs, several devices, lists that nobody checked, tables past 2^31 numbers.

That its operators compute the same as the CPU's is in the other files, whose tests have a ``device``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import devices
from problems import OUTPUTS, Problem, make_problem, python, with_entry

import ffm_ext
from ffm_ext import FFM, FFMInteraction, optim
from ffm_ext._arguments import GradMode
from ffm_ext.functional import ffm_interaction
from ffm_ext.reference import ffm_interaction as reference

ops = torch.ops.ffm_ext


@pytest.fixture(autouse=True)
def unchecked() -> None:
    """On a device, whose lists nobody looks at: the default."""
    if "cuda" not in devices():
        pytest.skip(
            "no CUDA device, or a build without CUDA: the tests with a device ran on the CPU alone"
        )
    ffm_ext.check_contents(False)


def on_cuda(form: str, F: int, K: int, **options: object) -> Problem:
    return make_problem(form, F, K, **options).to(device="cuda")  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["one-hot values", "csr values"])
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize(("F", "K"), [(100, 16), (39, 64), (2, 40_000), (200, 4)])
def test_samples_larger_than_shared_memory(form: str, output: str, F: int, K: int) -> None:
    problem = on_cuda(form, F, K, batch_size=8 if K < 1000 else 3)
    modes = {"output": output, "within_field": True}
    found = ffm_interaction(*problem.args, **modes)
    wanted = reference(*problem.to(torch.float64).args, **modes)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=2e-3)


def test_a_large_batch_goes_round_the_device() -> None:
    """More samples than blocks: slots of shared memory are used again and again."""
    torch.manual_seed(0)
    for dtype, K in ((torch.float32, 4), (torch.float32, 16), (torch.bfloat16, 4)):
        weight = torch.randn(5000, 39, K).to(dtype)
        ids = torch.randint(5000, (20_000, 39))
        wanted = ops.ffm_forward(weight, ids, None, None, None, "sum", False)
        found = ops.ffm_forward(weight.cuda(), ids.cuda(), None, None, None, "sum", False)
        rtol = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found.cpu(), wanted, rtol=rtol, atol=1e-2)


def test_views_that_are_aligned_to_their_numbers_alone() -> None:
    for dtype, K in (
        (torch.bfloat16, 4),
        (torch.float16, 3),
        (torch.float32, 4),
        (torch.float64, 5),
    ):
        table = torch.randn(30, 3, K, device="cuda").to(dtype)
        flat = torch.empty(table.numel() + 1, dtype=dtype, device="cuda")[1:]
        shifted = flat.copy_(table.flatten()).view(table.shape)
        ids = torch.randint(30, (50, 3), device="cuda")
        for output in OUTPUTS:
            a, b = (ffm_interaction(w, ids, output=output).double() for w in (table, shifted))
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize(
    ("form", "name"),
    [("one-hot", "indices"), ("csr values", "indices"), ("csr", "fields"), ("csr", "offsets")],
)
def test_unchecked_lists_spoil_their_sample_alone(form: str, name: str, output: str) -> None:
    good = on_cuda(form, 3, 4)
    at = 4 if name == "offsets" else 7
    for bad in (-1, 11, 2**40, -(2**62)):
        if name == "offsets" and bad > 0:
            continue
        problem = with_entry(good, name, at, bad)
        weight = problem.weight.clone().requires_grad_()
        out = ffm_interaction(weight, *problem.args[1:], output=output, grad="dense")
        out.nan_to_num().sum().backward()
        rows, wanted = out.detach().flatten(1) if out.dim() > 1 else out.detach()[:, None], None
        spoilt = rows.isnan().any(1)
        assert spoilt.any() and spoilt.sum() <= 2
        wanted = ffm_interaction(*good.args, output=output).view(rows.shape)
        assert torch.equal(rows[~spoilt], wanted[~spoilt]) or name == "offsets"
        assert weight.grad is not None and weight.grad.isfinite().all()
    torch.cuda.synchronize()  # nothing has ended the process's use of the GPU


def test_checked_lists_raise_and_change_nothing() -> None:
    ffm_ext.check_contents(True)
    layer = FFMInteraction(11, 3, 4, device="cuda")
    layer.fuse_optimizer(optim.SGD(lr=1.0))
    good = on_cuda("one-hot", 3, 4)
    out = layer(good.indices)
    before = layer.weight.detach().clone()
    good.indices.data[2, 1] = 11  # behind autograd's back
    text = r"ffm_backward_fused_: indices\[2, 1\] = 11 is out of range for a table of 11 features"
    with pytest.raises(IndexError, match=text):
        out.sum().backward()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("argument", ["weight", "indices", "fields", "values", "offsets"])
def test_tensors_of_another_device_are_named(argument: str) -> None:
    problem = make_problem("csr values", 3, 4)
    mixed = replace(problem.to(device="cuda"), **{argument: getattr(problem, argument)})
    named = "indices is on CUDA device 0, weight is on the CPU"
    if argument != "weight":
        named = f"{argument} is on the CPU, weight is on CUDA device 0"
    with pytest.raises(ValueError, match=re.escape(f"ffm_forward: {named}")):
        ops.ffm_forward(*mixed.args, "sum", False)


def test_current_stream() -> None:
    """Work is queued behind what its stream has: a kernel on another stream would read too early."""
    weight = torch.zeros(1000, 39, 16, device="cuda")
    ids = torch.randint(1000, (4096, 39), device="cuda")
    wanted = ffm_interaction(torch.ones_like(weight), ids)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        weight.fill_(1)
        found = ffm_interaction(weight, ids)
    stream.synchronize()
    assert torch.equal(found, wanted)


def captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def graphs(mode: str) -> pytest.MarkDecorator:
    return pytest.mark.compatibility("CUDA graphs of a training step", mode=mode, on="on a GPU")


@pytest.mark.parametrize("form", ["one-hot", "csr values"])
@pytest.mark.parametrize(
    "grad",
    [pytest.param("dense", marks=graphs("dense")), pytest.param("atomic", marks=graphs("atomic"))],
)
def test_graphs_of_forward_and_dense_gradient(form: str, grad: GradMode) -> None:
    """A graph is refused by anything that waits for the device or allocates by what it reads there."""
    problem = on_cuda(form, 7, 8, batch_size=64)
    weight = problem.weight.clone().requires_grad_()
    held: dict[str, torch.Tensor] = {}

    def step() -> None:
        held["out"] = ffm_interaction(weight, *problem.args[1:], grad=grad)
        (held["grad"],) = torch.autograd.grad(held["out"].sum(), weight)

    graph = captured(step)
    with torch.no_grad():
        weight.mul_(0.5)
        problem.indices.copy_(problem.indices.flip(0))
    graph.replay()
    found = {name: tensor.clone() for name, tensor in held.items()}
    step()
    for name, tensor in held.items():
        if grad == "dense" or name == "out":
            assert torch.equal(found[name], tensor), name
        torch.testing.assert_close(found[name], tensor)


@graphs("fused")
def test_graphs_of_a_fused_step() -> None:
    tables = []
    for uses_graph in (False, True):
        torch.manual_seed(0)
        layer = FFMInteraction(50, 7, 8, device="cuda")
        layer.fuse_optimizer(optim.AdaGrad(lr=0.1))
        ids = torch.randint(50, (64, 7), device="cuda")

        def step(layer: FFMInteraction = layer, ids: torch.Tensor = ids) -> None:
            layer(ids).square().sum().backward()

        if uses_graph:
            graph = captured(step)  # one step before, none while it is captured
            for _ in range(3):
                graph.replay()
        else:
            for _ in range(4):
                step()
        tables.append(layer.weight.detach().clone())
    assert torch.equal(*tables)


def test_graphs_refuse_the_sparse_gradient() -> None:
    """Its size is known to the device alone. The capture ends with an error, and the process goes on."""
    code = """
import torch, ffm_ext
layer = ffm_ext.FFMInteraction(50, 7, 8, device="cuda")
ids = torch.randint(50, (64, 7), device="cuda")
layer(ids).sum().backward()
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        layer(ids).sum().backward()
except RuntimeError as error:
    print("refused:", " ".join(str(error).split()))
layer.weight.grad = None
layer(ids).sum().backward()
print("goes on:", bool(layer.weight.grad._values().isfinite().all()))
"""
    run = python("-c", code)
    assert run.returncode == 0, run.stderr
    assert re.search("refused: .*captur", run.stdout), run.stdout
    assert "goes on: True" in run.stdout


def test_a_layer_says_that_its_gradient_is_coalesced_without_waiting() -> None:
    layer = FFMInteraction(50, 7, 8, device="cuda")
    ids = torch.randint(50, (64, 7), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(ids).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert layer.weight.grad is not None and layer.weight.grad.is_coalesced()


def test_the_count_of_updates_stays_on_the_cpu() -> None:
    layer = FFMInteraction(11, 3, 4)
    layer.fuse_optimizer(optim.Adam())
    layer.cuda()
    assert layer.get_buffer("optimizer_step").device.type == "cpu"
    assert layer.get_buffer("optimizer_mean").is_cuda
    layer(torch.zeros(1, 3, dtype=torch.int64, device="cuda")).sum().backward()
    assert int(layer.get_buffer("optimizer_step")) == 1


def test_both_ways_to_copy_rows_give_the_same_bits(tmp_path: Path) -> None:
    """Bulk copies of sm_90 and cp.async: the variable is read at every launch, but by C++: hence processes."""
    code = """
import sys, torch, ffm_ext
torch.manual_seed(0)
found = []
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for K in (4, 8, 16, 5):
        weight = torch.randn(3000, 39, K).to(dtype).cuda()
        ids = torch.randint(3000, (5000, 39)).cuda()
        for output in ("sum", "dot"):
            found.append(torch.ops.ffm_ext.ffm_forward(weight, ids, None, None, None, output, False).cpu())
torch.save(found, sys.argv[1])
"""
    paths = [tmp_path / f"{wanted}.pt" for wanted in "01"]
    for wanted, path in zip("01", paths):
        run = python("-c", code, str(path), FFM_EXT_BULK_COPIES=wanted)
        assert run.returncode == 0, run.stderr
    for a, b in zip(*map(torch.load, paths)):
        assert torch.equal(a, b)


def test_offsets_into_the_table_are_64_bit() -> None:
    N, F, K = 14_000_000, 39, 4  # 2.2e9 numbers
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("less than 12 GiB of the GPU's memory are free")
    weight = torch.zeros(N, F, K, dtype=torch.bfloat16, device="cuda")
    ids = torch.randint(N - 1000, N, (100, F), device="cuda")
    weight[N - 1000 :] = torch.randn(1000, F, K).to(weight)
    small = weight[N - 1000 :].clone()
    wanted = ffm_interaction(small, ids - (N - 1000))
    assert torch.equal(ffm_interaction(weight, ids), wanted)


def test_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    problem = make_problem("csr values", 3, 4).to(device="cuda:1")
    with torch.cuda.device(0):
        found = ffm_interaction(*problem.args)
    assert found.device == torch.device("cuda:1")
    torch.testing.assert_close(found.cpu(), ffm_interaction(*problem.to(device="cpu").args))


def test_a_model_with_ids_outside_the_table_goes_on() -> None:
    """Its linear term is PyTorch's lookup, which would end the process's use of the GPU."""
    model = FFM(4, num_features=11, num_fields=3).cuda()
    ids = torch.tensor([[0, 1, 2], [0, 11, 2]], device="cuda")
    found = model(ids)
    assert found[0].isfinite() and found[1].isnan()


def test_trainer_is_for_the_cpu() -> None:
    model = FFM(4, num_features=11, num_fields=3).cuda()
    with pytest.raises(ValueError, match="Trainer: model is on cuda:0, not the CPU"):
        ffm_ext.training.Trainer(model)
