# SPDX-License-Identifier: MIT
"""A Bayesian FFM on MovieLens-100K: ratings (RMSE), and whether a film is liked (logloss of rating >= 4).

    python examples/movielens.py                           # fetches the data, or uses what is in $FFM_EXT_DATA
    python examples/movielens.py --validate --embed-dim 4  # how the defaults were chosen

People and films meet in 6 % of their pairs here, and a single best set of weights overfits long before it has learnt who
likes what. So `posterior` walks through all sets of weights that explain the ratings well, and the predictions of its
draws are averaged. A draw costs one forward and one backward pass over all training samples.

Hyper-parameters were chosen with `--validate`: train on the training rows (70 %), score on the validation rows (10 %).
A plain run trains on both, and scores the test rows (20 %) once all draws are made.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits

import ffm_ext

# What others reach with this split and these fields; the first of each is to be matched.
PEERS = {
    "RMSE": {"xLearn FFM": 0.9265, "fastFM MCMC": 0.9093, "ridge": 0.9526, "constant": 1.131},
    "logloss": {"libffm": 0.5620},
}


def posterior(
    model: ffm_ext.FFM,
    batch: ffm_ext.SparseBatch,
    energy: Callable[[Tensor], Tensor],
    curvature: float,
    step_size: float,
    friction: float,
) -> Iterator[float]:
    """Walk through the posterior of the weights: after every yield, the model holds the next draw.

    Underdamped Langevin dynamics in the splitting BAOAB (Leimkuhler & Matthews, "Rational Construction of Stochastic
    Numerical Methods for Molecular Sampling", 2013), on all samples at once. The prior of a weight is N(0, 1/precision);
    the precisions are drawn as well (as in Rendle, "Factorization Machines with libFM", 2012).

    Args:
        model: with ``grad="dense"``.
        batch: B samples.
        energy: scores ``[B]`` -> minus their log-likelihood, a scalar.
        curvature: the second derivative of a sample's energy with respect to its score, roughly.
        step_size: in units of the shortest oscillation of a weight on its own; unstable from about 0.6 on.
        friction: the share of a velocity that is lost and drawn anew in a step.

    Yields:
        The energy before the step.
    """
    assert model.feature_fields is not None and batch.values is not None
    fields = model.feature_fields.long()
    num_fields, embed_dim = model.interaction.num_fields, model.interaction.embed_dim
    squares = torch.zeros(len(fields)).index_add_(0, batch.indices, batch.values**2)[:, None]

    bias, linear, table = model.linear.bias, model.linear.weight, model.interaction.weight
    weights = [bias, linear, table]
    # How sharply the samples alone determine a weight. For a factor this depends on the factors it meets, whose mean
    # square is about 0.1; such guesses change how fast the walk is, not where it leads.
    hessians = [torch.tensor(curvature * len(batch)), curvature * squares, 0.1 * curvature * squares]
    velocities = [torch.randn_like(weight) for weight in weights]  # N(0, 1): in units of mass^-1/2
    kept = 1 - friction

    while True:
        loss = energy(model(batch))
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            precisions = [
                torch.tensor(0.0),
                draw_precision(linear, fields, (num_fields, 1), shape=0.5, rate=0.5),
                draw_precision(table, fields, (num_fields, num_fields), shape=1.0, rate=0.05),
            ]
            for weight, gradient, hessian, precision, velocity in zip(
                weights, gradients, hessians, precisions, velocities, strict=True
            ):
                step = step_size / (hessian + precision).sqrt()  # the mass of a weight is its curvature
                velocity -= step * (gradient + precision * weight)
                weight += step / 2 * velocity
                velocity.mul_(kept).add_(torch.randn_like(velocity), alpha=(1 - kept**2) ** 0.5)
                weight += step / 2 * velocity
        yield loss.item()


def draw_precision(
    weight: Tensor, fields: Tensor, blocks: tuple[int, int], shape: float, rate: float
) -> Tensor:
    """A precision for each block of the weights from its conditional, Gamma(shape + n/2, rate + |block|²/2).

    A block is all weights of one field's features: in the table ``[N, F·K]``, those that meet one other field.

    Args:
        weight: ``[N, columns · K]``.
        fields: the field of each row, ``[N]``.
        blocks: how many fields and columns there are.
        shape, rate: of the Gamma prior.

    Returns:
        The precision of every weight, like ``weight``.
    """
    squares = weight.square().unflatten(1, (blocks[1], -1))  # [N, columns, K]
    norms = torch.zeros(blocks).index_add_(0, fields, squares.sum(2))
    counts = torch.bincount(fields)[:, None] * squares.shape[2]
    precision = torch.distributions.Gamma(shape + counts / 2, rate + norms / 2).sample()
    return precision[fields].repeat_interleave(squares.shape[2], 1)


def draw_predictions(
    metric: str, ds: ffm_ext.datasets.FieldDataset, train: Tensor, held_out: Tensor, args: argparse.Namespace
) -> Tensor:
    """What every draw after the burn-in predicts for the rows ``held_out``, ``[draws, n]``."""
    x, y = ds.data[train], ds.target[train]
    unseen = ds.data[held_out]
    if metric == "RMSE":
        precision = 1 / args.rating_std**2
        start, curvature = y.mean(), precision

        def energy(scores: Tensor) -> Tensor:
            return (scores - y).square().sum() * (precision / 2)

        def predict(scores: Tensor) -> Tensor:
            return scores.clamp(1, 5)
    else:
        y = (y >= 4).float()
        start, curvature = y.mean().logit(), 0.25

        def energy(scores: Tensor) -> Tensor:
            return binary_cross_entropy_with_logits(scores, y, reduction="sum")

        predict = torch.sigmoid

    torch.manual_seed(args.seed)
    model = ffm_ext.FFM(args.embed_dim, fields=ds.fields, within_field=args.within_field, grad="dense")
    torch.nn.init.constant_(model.linear.bias, start)
    walk = posterior(model, x, energy, curvature, args.step_size, args.friction)
    predictions = []
    began = time.perf_counter()
    for step, loss in zip(range(1, args.steps + 1), walk):
        if step > args.burn_in:
            with torch.no_grad():
                predictions.append(predict(model(unseen)))
        if step % 50 == 0:
            print(
                f"  {metric}: step {step}/{args.steps}, energy a sample {loss / len(x):.4f}, "
                f"{time.perf_counter() - began:.0f} s",
                flush=True,
            )
    return torch.stack(predictions)


def score(metric: str, prediction: Tensor, rating: Tensor) -> float:
    if metric == "RMSE":
        return (prediction - rating).square().mean().sqrt().item()
    return binary_cross_entropy(prediction, (rating >= 4).float()).item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embed-dim", type=int, default=8)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--burn-in", type=int, default=200)
    parser.add_argument("--step-size", type=float, default=0.4)
    parser.add_argument("--friction", type=float, default=0.1)
    parser.add_argument("--rating-std", type=float, default=0.9, help="noise of a rating")
    parser.add_argument("--within-field", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validate", action="store_true")
    args = parser.parse_args()

    torch.set_num_threads(1)
    ds = ffm_ext.datasets.fetch_movielens_100k()
    train, held_out = ds.rows["train"], ds.rows["valid"]
    if not args.validate:
        train, held_out = torch.cat([train, held_out]), ds.rows["test"]
    rating = ds.target[held_out]
    for metric in PEERS:
        p = draw_predictions(metric, ds, train, held_out, args)
        print(metric, "last", score(metric, p[-1], rating), *[(len(p)*k//4, score(metric, p[:len(p)*k//4].mean(0), rating)) for k in (1,2,3,4)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
