# SPDX-License-Identifier: MIT
"""Optimizers inside backward, against torch.optim on dense gradients and against formulas."""

import copy

import numpy as np
import pytest
import torch
from problems import here

import ffm_ext
from ffm_ext import optim

pytestmark = pytest.mark.usefixtures("device")

N, F, K = 23, 5, 4
SHAPES = [(23, 5, 4), (40, 7, 3), (31, 4, 8), (19, 3, 16), (17, 3, 20), (9, 2, 1)]


def batch(N, F, B=33, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, N, (B, F), generator=generator, dtype=torch.int32).to(here())


def layer(N, F, K, dtype=torch.float64, grad="dense", **options):
    torch.manual_seed(1)
    made = ffm_ext.FFMInteraction(N, F, K, dtype=dtype, grad=grad, **options)
    with torch.no_grad():
        made.weight.normal_(std=0.5)
    return made.to(here())


def loss_of(made, ids, values=None):
    return torch.nn.functional.softplus(made(ids, values)).sum()


def fit(made, optimizer, steps=4, N=N, F=F, values=None):
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(made, batch(N, F, seed=step), values).backward()
        optimizer.step()


TORCH = {
    "sgd": (optim.SGD(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "adagrad": (
        optim.AdaGrad(lr=0.1, initial_accumulator=0.5),
        lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5, eps=0),
    ),
    "adagrad from 0": (
        optim.AdaGrad(lr=0.1, initial_accumulator=0),
        lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-30),
    ),
    "adam": (optim.Adam(lr=0.05), lambda p: torch.optim.SparseAdam(p, lr=0.05)),
}


@pytest.mark.parametrize(("N", "F", "K"), SHAPES)
@pytest.mark.parametrize("name", TORCH)
def test_as_torch_optim(name, N, F, K):
    ours, theirs = TORCH[name]
    fused = layer(N, F, K)
    plain = copy.deepcopy(fused)
    plain.grad = "sparse" if name == "adam" else "dense"
    fit(fused, fused.fuse_optimizer(ours), N=N, F=F)
    fit(plain, theirs(plain.parameters()), N=N, F=F)
    torch.testing.assert_close(fused.weight, plain.weight, rtol=1e-9, atol=1e-12)
    assert fused.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("embed_dim", [1023, 1025, 2100])
@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_long_narrow_rows(name, embed_dim, dtype):
    """They are widened a piece at a time."""
    torch.manual_seed(0)
    weight, grad_rows = torch.rand(2, 3, 2, embed_dim, device=here()).to(dtype)
    wide = weight.float()
    made = optim.OPTIMIZERS[name](lr=0.1)
    for table, rows in ((weight, grad_rows), (wide, grad_rows.float())):
        states = list(made.new_state(table.flatten(1), embed_dim).values())
        torch.ops.ffm_ext.ffm_update_(table, states, None, rows, name, made.settings(), 1, None)
    torch.testing.assert_close(weight, wide.to(dtype))


def test_adam_with_betas_near_one():
    """1 - beta in float32 would be 0, or a few bits."""
    options = {"lr": 0.01, "betas": (0.9, 0.99999999)}
    fused, plain = layer(N, F, K, dtype=torch.float32), layer(N, F, K, grad="sparse")
    with torch.no_grad():
        plain.weight.copy_(fused.weight)
    fit(fused, fused.fuse_optimizer(optim.Adam(**options)))
    fit(plain, torch.optim.SparseAdam(plain.parameters(), **options))
    torch.testing.assert_close(fused.weight.double(), plain.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)]
)
def test_narrow_tables(name, dtype, tolerance):
    ours, theirs = TORCH[name]
    fused, plain = (
        layer(N, F, K, dtype=dtype),
        layer(N, F, K, grad="sparse" if name == "adam" else "dense"),
    )
    with torch.no_grad():
        plain.weight.copy_(fused.weight)
    fit(fused, fused.fuse_optimizer(ours))
    fit(plain, theirs(plain.parameters()))
    torch.testing.assert_close(fused.weight.double(), plain.weight, rtol=tolerance, atol=tolerance)


DECAYING = {
    "sgd": (optim.SGD(lr=0.1, weight_decay=0.3), torch.optim.SGD, {}),
    "adagrad": (
        optim.AdaGrad(lr=0.1, weight_decay=0.3),
        torch.optim.Adagrad,
        {"initial_accumulator_value": 1.0, "eps": 0},
    ),
    # SparseAdam, which ours is, adds eps before it corrects the bias, Adam after.
    "adam": (optim.Adam(lr=0.1, weight_decay=0.3, eps=1e-12), torch.optim.Adam, {"eps": 1e-12}),
}


@pytest.mark.parametrize("name", DECAYING)
def test_weight_decay_is_that_of_touched_rows(name):
    ours, theirs, options = DECAYING[name]
    fused, plain = layer(N, F, K), layer(N, F, K)
    before = plain.weight.detach().clone()
    handle = fused.fuse_optimizer(ours)
    optimizer = theirs(plain.parameters(), lr=0.1, weight_decay=0.3, **options)
    for step in range(3):
        # Every step has the same rows: those that none touches would decay in torch.
        ids = batch(N, F)[torch.randperm(33, generator=torch.Generator().manual_seed(step))] % (
            N - 3
        )
        for made, o in ((fused, handle), (plain, optimizer)):
            o.zero_grad()
            loss_of(made, ids).backward()
            o.step()
    touched = ids.unique().long()
    torch.testing.assert_close(fused.weight[touched], plain.weight[touched])
    untouched = torch.ones(N, dtype=torch.bool).index_fill(0, touched.cpu(), False)
    assert untouched.sum() >= 3
    assert torch.equal(fused.weight[untouched], before[untouched])


@pytest.mark.parametrize(("N", "F", "K"), SHAPES)
def test_vector_adagrad(N, F, K):
    fused, plain = layer(N, F, K), layer(N, F, K)
    fused.fuse_optimizer(optim.VectorAdaGrad(lr=0.1, initial_accumulator=0.7, weight_decay=0.2))
    total = torch.full((N, F, 1), 0.7, dtype=torch.float64, device=here())
    for step in range(3):
        ids = batch(N, F, seed=step)
        loss_of(fused, ids).backward()
        plain.weight.grad = None
        loss_of(plain, ids).backward()
        touched = torch.zeros_like(plain.weight).index_fill_(0, ids.unique().long(), 1)
        g = (plain.weight.grad + 0.2 * touched * plain.weight.detach()).view(N, F, K)
        total += (g**2).mean(2, keepdim=True)
        with torch.no_grad():
            plain.weight.view(N, F, K).sub_(0.1 * g / total.sqrt())
    torch.testing.assert_close(fused.weight, plain.weight)
    torch.testing.assert_close(fused.optimizer_sum, total[..., 0])


@pytest.mark.parametrize(("N", "F", "K"), SHAPES)
def test_ftrl(N, F, K):
    options = {"lr": 0.2, "beta": 0.5, "weight_decay": 0.1}
    fused, plain = layer(N, F, K), layer(N, F, K)
    fused.fuse_optimizer(optim.FTRL(l1=0.05, **options))
    w = plain.weight.detach().clone()
    z, n = -w * (0.5 / 0.2 + 0.1) - w.sign() * 0.05, torch.zeros_like(w)
    for step in range(4):
        ids = batch(N, F, seed=step)
        loss_of(fused, ids).backward()
        plain.weight.grad = None
        loss_of(plain, ids).backward()
        g = plain.weight.grad
        z += g - ((n + g * g).sqrt() - n.sqrt()) / 0.2 * w
        n += g * g
        new = -(z - z.sign() * 0.05) / ((0.5 + n.sqrt()) / 0.2 + 0.1)
        new[z.abs() <= 0.05] = 0
        touched = ids.unique().long()
        w[touched] = new[touched]
        with torch.no_grad():
            plain.weight.copy_(w)
    torch.testing.assert_close(fused.weight.detach(), w)


def test_l1_of_ftrl_makes_zeros():
    zeros = []
    for l1 in (0.0, 3.0):
        made = layer(N, F, K)
        made.fuse_optimizer(optim.FTRL(lr=0.1, l1=l1))
        for step in range(20):
            loss_of(made, batch(N, F, seed=step)).backward()
        zeros.append(int((made.weight == 0).sum()))
    assert zeros[0] == 0 and zeros[1] > 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "optimizer", [optim.AdaGrad(lr=0.1), optim.VectorAdaGrad(lr=0.1), optim.Adam()]
)
def test_same_bits_for_any_number_of_threads(dtype, optimizer, threads_restored):
    tables = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        made = layer(200, 13, 4, dtype=dtype)
        handle = made.fuse_optimizer(optimizer)
        for step in range(2):
            loss_of(made, batch(200, 13, B=3000, seed=step)).backward()
            handle.step()
        tables.append(made.weight.detach())
    assert torch.equal(tables[0], tables[1]) and torch.equal(tables[0], tables[2])


@pytest.fixture
def threads_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def ragged(N, F, B, seed=0):
    rng = np.random.RandomState(seed)
    counts = rng.randint(0, 9, B)
    nnz = int(counts.sum())
    return ffm_ext.SparseBatch(
        torch.from_numpy(rng.randint(0, N, nnz)),
        torch.from_numpy(rng.randint(0, F, nnz)),
        torch.from_numpy(rng.randn(nnz)),
        torch.from_numpy(np.concatenate([[0], counts.cumsum()])),
    ).to(here())


@pytest.mark.parametrize("output", ["sum", "dot", "hadamard"])
@pytest.mark.parametrize("within_field", [False, True])
def test_ragged_samples_and_every_output(output, within_field):
    options = {"output": output, "within_field": within_field}
    fused, plain = layer(N, F, K, **options), layer(N, F, K, **options)
    data = ragged(N, F, 60)
    a, b = (data.values.clone().requires_grad_() for _ in range(2))
    handle = fused.fuse_optimizer(optim.SGD(lr=0.1))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for made, values in ((fused, a), (plain, b)):
        sample = ffm_ext.SparseBatch(data.indices, data.fields, values, data.offsets)
        loss_of(made, sample).backward()
    handle.step()
    optimizer.step()
    torch.testing.assert_close(fused.weight, plain.weight)
    torch.testing.assert_close(a.grad, b.grad)


def test_second_forward_on_an_updated_table_raises():
    made = layer(N, F, K)
    made.fuse_optimizer(optim.SGD(lr=0.1))
    first, second = loss_of(made, batch(N, F)), loss_of(made, batch(N, F, seed=1))
    first.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


def test_schedulers_change_the_learning_rate():
    made, other = layer(N, F, K), layer(N, F, K)
    handle = made.fuse_optimizer(optim.SGD(lr=0.1))
    scheduler = torch.optim.lr_scheduler.StepLR(handle, 1, gamma=0.5)
    plain = torch.optim.SGD(other.parameters(), lr=0.1)
    plain_scheduler = torch.optim.lr_scheduler.StepLR(plain, 1, gamma=0.5)
    for step in range(3):
        for m, o, s in ((made, handle, scheduler), (other, plain, plain_scheduler)):
            o.zero_grad()
            loss_of(m, batch(N, F, seed=step)).backward()
            o.step()
            s.step()
    torch.testing.assert_close(made.weight, other.weight)


@pytest.mark.parametrize("lrs", [(0.1, 0.01, 1.0), (0.0, 0.1, 0.0)])
def test_schedules_leave_the_weights_of_ftrl_where_they_are(lrs):
    """They are a function of its states and of the learning rate."""
    made = layer(N, F, K)
    handle = made.fuse_optimizer(optim.FTRL(lr=0.1, l1=0.01, weight_decay=0.02))
    fit(made, handle)
    for lr in lrs:
        before = made.weight.detach().clone()
        handle.param_groups[0]["lr"] = lr
        (made(batch(N, F)) * 0).sum().backward()
        torch.testing.assert_close(made.weight.detach(), before)
        handle.load_state_dict(copy.deepcopy(handle.state_dict()))
        fit(made, handle, steps=1)
        assert made.weight.isfinite().all()
        assert torch.equal(made.weight, before) == (lr == 0)


@pytest.mark.parametrize("what", ["reset", "loaded", "loaded from a plain dict", "handle loaded"])
def test_ftrl_keeps_weights_that_another_learning_rate_made(what):
    made = layer(N, F, K)
    handle = made.fuse_optimizer(optim.FTRL(lr=0.1, l1=0.01))
    fit(made, handle)
    handle.param_groups[0]["lr"] = 0.01
    fit(made, handle, steps=1)
    state = made.state_dict()
    if what == "reset":
        made.reset_parameters()
    else:
        made = layer(N, F, K)
        other = made.fuse_optimizer(optim.FTRL(lr=0.1, l1=0.01))
        if what == "handle loaded":
            other.load_state_dict(handle.state_dict())
        else:
            made.load_state_dict(dict(state) if "plain" in what else state)
    before = made.weight.detach().clone()
    (made(batch(N, F)) * 0).sum().backward()
    torch.testing.assert_close(made.weight.detach(), before)


@pytest.mark.parametrize("grad", ["dense", "fused"])
def test_hooks_that_copy_saved_tensors(grad):
    """As save_on_cpu does: gradients come as ever, and an update that would be lost is an error."""
    made, plain = layer(N, F, K), layer(N, F, K)
    if grad == "fused":
        made.fuse_optimizer(optim.AdaGrad())
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
        loss = loss_of(made, batch(N, F))
    if grad == "dense":
        loss.backward()
        loss_of(plain, batch(N, F)).backward()
        torch.testing.assert_close(made.weight.grad, plain.weight.grad)
        return
    with pytest.raises(RuntimeError, match="backward was given a copy of the table"):
        loss.backward()
    assert made.optimizer_step == 0


@pytest.mark.parametrize("optimizer", [optim.SGD(lr=0.1), optim.AdaGrad(lr=0.1)])
def test_gradients_of_values_alone_leave_the_table_as_it_is(optimizer):
    made = layer(N, F, K)
    made.fuse_optimizer(optimizer)
    before, x = made.weight.detach().clone(), batch(N, F)
    values = torch.rand(x.shape, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(loss_of(made, x, values), values)
    loss_of(made, x, values).backward(inputs=[values])
    assert torch.equal(made.weight, before)
    assert made.optimizer_step == 0
    other = layer(N, F, K)
    loss_of(other, x, values.detach().requires_grad_()).backward()
    torch.testing.assert_close(values.grad, found)
    loss_of(made, x, values).backward()
    assert not torch.equal(made.weight, before)
    torch.testing.assert_close(values.grad, 2 * found)


def test_what_a_fused_table_does_not_do():
    made = layer(N, F, 4)
    handle = made.fuse_optimizer(optim.SGD(lr=0.1))
    ids, before = batch(N, F), made.weight.detach().clone()
    with pytest.raises(RuntimeError, match="asks for the gradient of a table that has a fused opt"):
        torch.autograd.grad(made(ids).sum(), made.weight, allow_unused=True)
    assert torch.equal(made.weight, before)
    with pytest.raises(RuntimeError, match="it updates the table of its layer alone"):
        handle.add_param_group({"params": torch.nn.Linear(2, 2).parameters()})
    (made(ids).sum() + made.weight.square().sum()).backward()
    with pytest.raises(RuntimeError, match="a gradient from elsewhere than its layer"):
        handle.step()


def test_ftrl_with_learning_rates_that_vanish():
    made = layer(N, F, 4, dtype=torch.float32)
    handle = made.fuse_optimizer(optim.FTRL(lr=0.1))
    schedule = torch.optim.lr_scheduler.ExponentialLR(handle, gamma=1e-3)
    for _ in range(20):
        made(batch(N, F)).sum().backward()
        handle.step()
        schedule.step()
    assert made.weight.isfinite().all()


def test_state_dict_goes_on_where_it_stopped():
    made = layer(N, F, K)
    fit(made, made.fuse_optimizer(optim.Adam(lr=0.01)))
    again = layer(N, F, K)
    handle = again.fuse_optimizer(optim.Adam(lr=0.01))
    again.load_state_dict(made.state_dict())
    fit(made, made._fused)
    fit(again, handle)
    assert torch.equal(made.weight, again.weight)
    assert set(made.state_dict()) == {
        "weight",
        "optimizer_step",
        "optimizer_mean",
        "optimizer_square",
    }


def test_stochastic_rounding_keeps_the_mean_and_can_be_replayed():
    tables = []
    for seed in (1, 1, 2):
        made = layer(2000, 2, 4, dtype=torch.bfloat16)
        with torch.no_grad():
            made.weight.fill_(1.0)
        made.fuse_optimizer(optim.SGD(lr=2**-12, rounding_seed=seed))
        ids = torch.arange(2000, dtype=torch.int32, device=here()).view(-1, 2)
        made(ids).sum().backward()
        tables.append(made.weight.detach().float())
    # A step of 2^-12 is a sixteenth of the distance of 2^-8 to the next bfloat16 below 1: nearest would lose all of it.
    moved = tables[0].view(-1, 2, 2, 4)[:, [0, 1], [1, 0]]
    assert (moved == 1).float().mean().item() == pytest.approx(15 / 16, abs=0.01)
    assert moved.mean().item() == pytest.approx(1 - 2**-12, abs=3e-5)
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])


def test_bad_input():
    with pytest.raises(
        ValueError, match="AdaGrad: rounding_seed = 18446744073709551616 is out of range"
    ):
        optim.AdaGrad(rounding_seed=2**64)
    made = layer(N, F, K)
    with pytest.raises(TypeError, match=r"must be one of ffm_ext\.optim"):
        made.fuse_optimizer(torch.optim.SGD(made.parameters(), lr=0.1))
    for bad in (
        {"lr": 0.0},
        {"lr": -1.0},
        {"lr": float("nan")},
        {"lr": 0.1, "weight_decay": -1.0},
        {"lr": np.float32(-1)},
    ):
        with pytest.raises(ValueError, match=r"SGD: .* is out of range"):
            optim.SGD(**bad)
    for bad in ({"lr": "0.1"}, {"lr": 0.1, "rounding_seed": 1.5}, {"lr": None}):
        with pytest.raises(TypeError, match=r"SGD: .* is no number"):
            optim.SGD(**bad)
    for betas in ((0.9,), (0.9, 1.0), (0.9, float("nan"))):
        with pytest.raises(ValueError, match=r"Adam: betas = .* must be two numbers in \[0, 1\)"):
            optim.Adam(betas=betas)
    for eps in (0.0, 1e-50):
        with pytest.raises(ValueError, match=rf"Adam: eps = {eps} is 0 in float32"):
            optim.Adam(eps=eps)
    made.fuse_optimizer(optim.SGD(lr=0.1, rounding_seed=3))
    with pytest.raises(ValueError, match="rounding_seed is given, but weight is not bfloat16"):
        loss_of(made, batch(N, F)).backward()
    weight, rows = (torch.zeros(n, 2, 3, device=here()) for n in (4, 2))

    def update(
        states=(), listed=(0, 1), grad=rows, name="sgd", settings=(0.1, 0, 0, 0, 0, 0), step=1
    ):
        torch.ops.ffm_ext.ffm_update_(
            weight,
            [state.to(here()) for state in states],
            torch.tensor(listed, device=here()),
            grad,
            name,
            list(settings),
            step,
            None,
        )

    update()
    for match, options in (
        (r"rows\[1\] = 4 is out of range for a table of 4", {"listed": (0, 4)}),
        (r"rows\[1\] = 0 does not rise", {"listed": (0, 0)}),
        (r"optimizer = 'rmsprop' is not one of", {"name": "rmsprop"}),
        (r"settings has 1 numbers", {"settings": (0.1,)}),
        (r"states has 0 tensors, the optimizer keeps 1", {"name": "adagrad"}),
        (
            r"states\[0\] has shape \[4, 5\], it needs 4 rows of 6",
            {"name": "adagrad", "states": [torch.zeros(4, 5)]},
        ),
        (
            r"states\[0\] must be float32, got float64",
            {"name": "adagrad", "states": [torch.zeros(4, 6).double()]},
        ),
        (r"step = 0 must be at least 1", {"step": 0}),
        (r"grad_rows is float32 \[1, 2, 3\]", {"grad": rows[:1]}),
    ):
        with pytest.raises((ValueError, IndexError), match=match):
            update(**options)


def test_a_layer_that_is_gone_is_said_to_be():
    made = layer(N, F, K)
    made.fuse_optimizer(optim.SGD(lr=0.1))
    loss = loss_of(made, batch(N, F))
    del made
    with pytest.raises(RuntimeError, match="fused layer that has been deleted"):
        loss.backward()
