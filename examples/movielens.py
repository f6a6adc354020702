# SPDX-License-Identifier: MIT
"""A Bayesian FFM on MovieLens-100K: ratings (RMSE), and whether a film is liked (logloss of rating >= 4).

    python examples/movielens.py                           # fetches the data, or uses what is in $FFM_EXT_DATA
    python examples/movielens.py --validate --embed-dim 4  # how the defaults were chosen

People and films meet in 6 % of their pairs here, and a single best set of weights overfits long before it has learnt
who likes what. So `posterior` walks through all sets of weights that explain the ratings well, and the predictions of
its draws are averaged. A draw costs one forward and one backward pass over all training samples.

Hyper-parameters were chosen with `--validate`: train on the training rows (70 %), score on the validation rows (10 %).
A plain run trains on both, and scores the test rows (20 %) once all draws are made. The exit status is 1 where the
test scores miss those of xLearn and libffm.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits
from torch.optim.swa_utils import AveragedModel

import ffm_ext
from ffm_ext.datasets import fetch_movielens_100k

# What others reach on these test rows with these fields; the first of each is the one to match.
PEERS = {
    "RMSE": {"xLearn FFM": 0.9265, "fastFM MCMC": 0.9093, "ridge": 0.9526, "constant": 1.131},
    "logloss": {"libffm": 0.5620},
}
LIKED = 4  # the lowest rating that counts as a like


def posterior(
    model: ffm_ext.FFM,
    batch: ffm_ext.SparseBatch,
    energy: Callable[[Tensor], Tensor],
    curvature: float,
    *,
    step_size: float,
    friction: float,
    warm_up: int,
) -> Iterator[float]:
    """Walk through the posterior of the weights: after every yield, the model holds the next draw.

    Underdamped Langevin dynamics in the splitting BAOAB (Leimkuhler & Matthews, "Rational Construction of Stochastic
    Numerical Methods for Molecular Sampling", 2013), on all samples at once. The prior of a weight is
    N(0, 1/precision); the precisions are drawn as well (as in Rendle, "Factorization Machines with libFM", 2012).

    Args:
        model: with ``grad="dense"``.
        batch: B samples.
        energy: scores ``[B]`` -> minus their log-likelihood, a scalar.
        curvature: the second derivative of a sample's energy with respect to its score, roughly.
        step_size: of the dynamics, where 1 / (angular frequency) of a weight on its own is about 1.
        friction: the share of a velocity that is lost in a step, and drawn anew.
        warm_up: steps with the precisions at their prior mean. The table starts near zero; precisions drawn from such
            a table are high, and would keep it there.

    Yields:
        The energy before the step.

    Raises:
        FloatingPointError: the walk has diverged.
    """
    assert model.feature_fields is not None and batch.values is not None
    fields = model.feature_fields.long()
    num_fields = model.interaction.num_fields
    squares = torch.zeros(len(fields)).index_add_(0, batch.indices, batch.values**2)[:, None]
    bias, linear, table = model.linear.bias, model.linear.weight, model.interaction.weight
    weights = [bias, linear, table]
    # How sharply the samples determine a weight. For a factor that depends on the factors it meets, whose mean square
    # is about 0.1; the guess sets the pace of the walk, not where it leads.
    data_curvatures = [torch.tensor(curvature * len(batch)), curvature * squares]
    data_curvatures.append(0.1 * data_curvatures[1])
    velocities = [torch.randn_like(weight) for weight in weights]  # in units of 1 / sqrt(mass)
    kept = 1 - friction

    step = 0
    while True:
        loss = energy(model(batch))
        if not loss.isfinite():
            raise FloatingPointError(
                f"posterior: the energy is {loss.item()} at step {step}; "
                f"step_size = {step_size} is too large"
            )
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            drawn = step >= warm_up
            precisions = [
                torch.tensor(0.0),  # the bias has a flat prior
                precision_of(linear, fields, (num_fields, 1), shape=0.5, rate=0.5, drawn=drawn),
                precision_of(
                    table, fields, (num_fields, num_fields), shape=1, rate=0.05, drawn=drawn
                ),
            ]
            for weight, gradient, data_curvature, precision, velocity in zip(
                weights, gradients, data_curvatures, precisions, velocities, strict=True
            ):
                pace = step_size / (data_curvature + precision).sqrt()  # mass = curvature
                velocity.sub_(pace * (gradient + precision * weight))
                weight.add_(pace / 2 * velocity)
                velocity.mul_(kept).add_(torch.randn_like(velocity), alpha=math.sqrt(1 - kept**2))
                weight.add_(pace / 2 * velocity)
        step += 1
        yield loss.item()


def precision_of(
    weight: Tensor,
    fields: Tensor,
    blocks: tuple[int, int],
    *,
    shape: float,
    rate: float,
    drawn: bool,
) -> Tensor:
    """A precision for each block of weights, spread over its weights.

    A block is what the features of one field have for one column: in the table, for one field that they meet.

    Args:
        weight: ``[N, columns * K]``.
        fields: the field of each row, ``[N]``.
        blocks: how many fields and columns there are.
        shape, rate: of the Gamma prior.
        drawn: draw from Gamma(shape + n/2, rate + |block|²/2), n = weights in the block; else take the prior mean.
    """
    if not drawn:
        return torch.tensor(shape / rate)
    squares = weight.square().unflatten(1, (blocks[1], -1))  # [N, columns, K]
    K = squares.shape[2]
    norms = torch.zeros(blocks).index_add_(0, fields, squares.sum(2))
    counts = torch.bincount(fields, minlength=blocks[0])[:, None] * K
    precision = torch.distributions.Gamma(shape + counts / 2, rate + norms / 2).sample()
    return precision[fields].repeat_interleave(K, dim=1)


def draw_predictions(
    metric: str,
    ds: ffm_ext.datasets.FieldDataset,
    train_rows: Tensor,
    held_out_rows: Tensor,
    args: argparse.Namespace,
) -> tuple[Tensor, Tensor]:
    """Predictions for the n held-out rows, of each draw after the burn-in and of the mean of their weights.

    Returns:
        ``[draws, n]``, and ``[n]`` of the one model whose weights are the means.
    """
    batch, rating, held_out = ds.data[train_rows], ds.target[train_rows], ds.data[held_out_rows]
    assert isinstance(batch, ffm_ext.SparseBatch)
    liked = (rating >= LIKED).float()
    if metric == "RMSE":
        start, curvature = rating.mean().item(), 1 / args.rating_std**2
    else:
        start, curvature = liked.mean().logit().item(), 0.25

    def energy(scores: Tensor) -> Tensor:
        if metric == "RMSE":
            return (scores - rating).square().sum() / (2 * args.rating_std**2)
        return binary_cross_entropy_with_logits(scores, liked, reduction="sum")

    torch.manual_seed(args.seed)
    model = ffm_ext.FFM(args.embed_dim, fields=ds.fields, grad="dense")
    torch.nn.init.constant_(model.linear.bias, start)
    walk = posterior(
        model,
        batch,
        energy,
        curvature,
        step_size=args.step_size,
        friction=args.friction,
        warm_up=args.warm_up,
    )
    mean = AveragedModel(model)

    @torch.no_grad()
    def predict(predictor: torch.nn.Module) -> Tensor:
        scores: Tensor = predictor(held_out)
        return scores.clamp(1, 5) if metric == "RMSE" else scores.sigmoid()

    predictions = []
    began = time.perf_counter()
    for step in range(1, args.steps + 1):
        loss = next(walk)
        if step > args.burn_in:
            predictions.append(predict(model))
            mean.update_parameters(model)
        if step % 100 == 0 or step == args.steps:
            seconds = time.perf_counter() - began
            print(
                f"  {metric}: step {step} of {args.steps}, {seconds:.0f} s, "
                f"energy a training sample {loss / len(batch):.4f}",
                flush=True,
            )
    return torch.stack(predictions), predict(mean)


def score(metric: str, prediction: Tensor, rating: Tensor) -> float:
    if metric == "RMSE":
        return (prediction - rating).square().mean().sqrt().item()
    return binary_cross_entropy(prediction, (rating >= LIKED).float()).item()


def plot(draws: dict[str, Tensor], rating: Tensor, file: Path, *, peers: bool) -> None:
    """The score of the average of the first n draws, over n, beside the peers' where those are for the same rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(draws), figsize=(11, 4), layout="constrained")
    for ax, (metric, predictions) in zip(axes, draws.items(), strict=True):
        number = torch.arange(1, len(predictions) + 1)
        averages = predictions.cumsum(0) / number[:, None]
        ax.plot(number, [score(metric, p, rating) for p in averages], label="FFM, average of draws")
        for peer, value in PEERS[metric].items():
            if peers and peer != "constant":  # far above all others
                ax.axhline(value, color="gray", linestyle="--")
                ax.text(len(number), value, f"{peer} {value:.4f}", ha="right", va="bottom")
        ax.set(xlabel="draws", ylabel=metric)
        ax.legend()
    figure.savefig(file, dpi=120)
    print(f"saved {file}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--embed-dim", type=int, default=8)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--burn-in", type=int, default=200, help="first steps, not averaged")
    parser.add_argument("--warm-up", type=int, default=50, help="first steps, precisions fixed")
    parser.add_argument("--step-size", type=float, default=0.3)
    parser.add_argument("--friction", type=float, default=0.1)
    parser.add_argument("--rating-std", type=float, default=0.9, help="the noise of a rating")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--validate", action="store_true", help="score the validation rows")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="save the scores as an image")
    args = parser.parse_args()
    if not 0 <= args.burn_in < args.steps:
        parser.error(f"--burn-in {args.burn_in} must be in [0, --steps), --steps is {args.steps}")

    torch.set_num_threads(args.threads)
    ds = fetch_movielens_100k()
    train, held_out, part = ds.rows["train"], ds.rows["valid"], "validation"
    if not args.validate:
        train, held_out, part = torch.cat([train, held_out]), ds.rows["test"], "test"
    rating = ds.target[held_out]
    print(f"{ds.name}: train on {len(train)} ratings, score {len(held_out)} {part} ratings")

    results = {metric: draw_predictions(metric, ds, train, held_out, args) for metric in PEERS}
    missed = False
    for metric, (predictions, point) in results.items():
        average = score(metric, predictions.mean(0), rating)
        print(f"\n{part} {metric}")
        print(f"  {f'FFM, average of {len(predictions)} draws':<28}{average:.4f}")
        print(f"  {'FFM, mean of their weights':<28}{score(metric, point, rating):.4f}")
        print(f"  {'FFM, last draw alone':<28}{score(metric, predictions[-1], rating):.4f}")
        if not args.validate:  # the peers' figures are for the test rows
            for peer, value in PEERS[metric].items():
                print(f"  {peer:<28}{value:.4f}")
            if not average <= next(iter(PEERS[metric].values())):
                print("  misses the first of these", file=sys.stderr)
                missed = True
    if args.plot:
        plot(
            {metric: draws for metric, (draws, _) in results.items()},
            rating,
            args.plot,
            peers=not args.validate,
        )
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
