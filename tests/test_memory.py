# SPDX-License-Identifier: MIT
"""What a call allocates, and that offsets into a table pass 2^31."""

from __future__ import annotations

import pytest
import torch
from problems import num_threads, python
from torch.profiler import ProfilerActivity, profile
from torch.torch_version import TorchVersion

from ffm_ext.functional import ffm_interaction
from ffm_ext.memory import empty_table
from ffm_ext.reference import ffm_interaction as reference

B, F, K, N = 512, 39, 4, 1000


def allocated(function: object, *args: object, **kwargs: object) -> int:
    """Bytes that torch's allocator gives out during a call, whether or not they come back."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        function(*args, **kwargs)  # type: ignore[operator]
    return sum(max(0, event.self_cpu_memory_usage) for event in run.key_averages())


def test_forward_allocates_its_output_alone() -> None:
    weight, indices = torch.randn(N, F, K), torch.randint(N, (B, F))
    sums = B * F * F * K * 4
    assert (
        allocated(reference, weight, indices, grad="dense") > sums
    )  # the measure sees such a temporary
    for threads in (1, 2):
        with num_threads(threads):
            assert allocated(ffm_interaction, weight, indices) <= 2 * B * 4


def test_sparse_step_allocates_its_gradient_alone() -> None:
    weight = torch.randn(N, F, K, requires_grad=True)
    indices = torch.randint(N, (B, F))
    rows = indices.unique().numel()

    def step() -> None:
        ffm_interaction(weight, indices, grad="sparse").sum().backward()

    step()
    weight.grad = None
    assert allocated(step) <= rows * F * K * 4 + rows * 8 + 64 * B


def test_frozen_table_has_no_gradient_made() -> None:
    weight, indices = torch.randn(N, F, K), torch.randint(N, (B, F))
    values = torch.rand(B, F, requires_grad=True)
    for grad in ("dense", "sparse"):
        out = ffm_interaction(weight, indices, values=values, grad=grad).sum()
        assert allocated(out.backward) <= 2 * B * F * 4 + 64 * B < weight.numel() * 4


# Prints by how many bytes the process has grown at most, after a small call of the same kind, for each way to call.
PEAK = """
import re, torch
from ffm_ext.functional import ffm_interaction
from ffm_ext.memory import empty_table

B, F, K, N = 4000, 39, 16, 1000

def peak():
    with open("/proc/self/status") as file:
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", file.read())[1]) << 10

weight = torch.randn(N, F, K, requires_grad=True)
indices = torch.randint(N, (B, 2 * F))
fields = torch.arange(F).repeat(2 * B)
offsets = torch.arange(B + 1) * 2 * F
for threads in (1, 2):
    torch.set_num_threads(threads)
    for csr in (False, True):
        for backward in (False, True):
            grown = []
            for b in (4, B):
                before = peak()
                batch = indices[:b, :F].contiguous(), None, None, None
                if csr:
                    batch = indices[:b].flatten(), fields[: b * 2 * F], None, offsets[: b + 1]
                out = ffm_interaction(weight, *batch, grad="sparse")
                if backward:
                    torch.autograd.grad(out.sum(), weight)
                grown.append(peak() - before)
            print(grown[-1])
"""


def test_scratch_does_not_grow_with_the_batch() -> None:
    """The resident size sees what torch's allocator does not: the kernels' own scratch."""
    run = python("-c", PEAK)
    assert run.returncode == 0, run.stderr
    grown = [int(line) for line in run.stdout.split()]
    sums = 4000 * 39 * 39 * 16 * 4
    assert len(grown) == 8
    assert max(grown) < sums / 8, f"{grown} bytes, where the field sums would be {sums}"


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_offsets_are_64_bit() -> None:
    n = 2**31 // (F * K) + 10
    weight = torch.empty(n, F, K)  # 8.6 GB of addresses, of which only a few pages are touched
    assert weight.numel() > 2**31
    before = resident()
    ids = torch.stack([torch.arange(F), torch.arange(n - F, n)])
    # Small, for the sum of some 10,000 products of either sign is rounded by what its parts are.
    weight[ids.flatten()] = 0.1 * torch.randn(2 * F, F, K)
    small = weight[ids.flatten()].clone().requires_grad_()
    for dtype in (torch.int32, torch.int64):
        weight.requires_grad_()
        weight.grad = None
        found = ffm_interaction(weight, ids.to(dtype))
        expected = reference(small, torch.arange(2 * F).view(2, F), grad="dense")
        torch.testing.assert_close(found, expected)
        (found * torch.tensor([1.0, 2.0])).sum().backward()
        small.grad = None
        (expected * torch.tensor([1.0, 2.0])).sum().backward()
        assert weight.grad is not None
        assert weight.grad._indices()[0].tolist() == ids.flatten().tolist()
        torch.testing.assert_close(weight.grad._values(), small.grad)
    if resident() - before > 1 << 30:
        pytest.fail("rows that no sample has were touched")


# Prints the address of a large gradient and what is kept, after each of several steps.
KEPT = """
import torch
from ffm_ext import memory
from ffm_ext.functional import ffm_interaction
from ffm_ext.memory import empty_table

weight = torch.randn(40_000, 39, 4, requires_grad=True)
small = torch.randn(100, 39, 4, requires_grad=True)

def step(table, n):
    indices = torch.arange(n * 39).view(n, 39) % table.shape[0]
    (gradient,) = torch.autograd.grad(ffm_interaction(table, indices, grad="dense").sum(), table)
    assert gradient.abs().sum() > 0
    return gradient

addresses = []
for n in (500, 510, 490):
    gradient = step(weight, n)
    addresses.append(gradient.data_ptr())
    in_use = memory.kept_bytes()
    del gradient
print(len(set(addresses)), in_use, memory.kept_bytes())
two = [step(weight, 500), step(weight, 500)]
print(two[0].data_ptr() == two[1].data_ptr(), memory.kept_bytes())
del two
for _ in range(40):
    step(weight, 500)
print(memory.kept_bytes())
step(small, 10)
memory.release()
print(memory.kept_bytes())
"""


@pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.11",
    reason="torch 2.10 makes no tensor of memory with a deleter",
)
def test_a_table_that_memory_does_not_hold() -> None:
    message = r"table of shape \[1099511627776, 64\] in torch.bfloat16: 140737488355328 bytes"
    with pytest.raises(MemoryError, match=message):
        empty_table(1 << 40, 64, dtype=torch.bfloat16)


def test_memory_of_gradients_is_kept() -> None:
    run = python("-c", KEPT)
    assert run.returncode == 0, run.stderr
    steps, two, later, released = run.stdout.splitlines()
    size = 40_000 * 39 * 4 * 4
    addresses, in_use, kept = map(int, steps.split())
    assert addresses == 1 and in_use == 0
    assert size <= kept <= size * 1.2
    assert two == "False 0"
    assert int(later) == kept  # of two blocks, the one that is no longer used was given back
    assert int(released) == 0

    run = python("-c", KEPT, FFM_EXT_KEEP_MEMORY="0")
    assert run.returncode == 0, run.stderr
    assert [line.split()[-1] for line in run.stdout.splitlines()] == ["0"] * 4
