# SPDX-License-Identifier: MIT
"""What the demo does, in its order, and what it prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import ffm_ext

from ._plots import plot_quality, plot_speed
from ._timing import REPEATS, Timing, Workload, time_interaction
from ._training import BATCH_SIZE, EMBED_DIM, Fit, fit_logistic_regression, train_ffm


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    threads: int = 1,
    epochs: int = 8,
    workload: Workload | None = None,
) -> None:
    """Train an FFM on the Adult data beside logistic regression, time the fused layer, print and plot both.

    Args:
        out: the folder for ``quality.png`` and ``speed.png``; made where it is missing.
        seed: of the initial weights, the shuffling and the timed batch.
        threads: of torch's pool, from here on. Training gains nothing from more than one at this size; one is also what
            compares code rather than machines, and stays true where other programs want the cores.
        epochs: passes over the training rows.
        workload: what is timed; ``None`` = Criteo's shape.

    Raises:
        OSError: the plots cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)  # before the work: a bad path should not cost a minute
    workload = workload or Workload()
    torch.set_num_threads(threads)
    info = ffm_ext.build_info()
    machine = f"{_threads(info['threads'])}, {info['isa']}"
    console = Console(highlight=False)
    console.print(f"ffm_ext {info['version']}, torch {info['torch']}, {machine}\n")

    # torch's optimizers make sparse tensors of what they were given; torch asks for a decision on checking them.
    with torch.sparse.check_sparse_tensor_invariants(enable=False):
        dataset = ffm_ext.datasets.load_adult()
        console.print("[bold]Who earns more than 50,000 dollars a year?[/bold]")
        console.print(
            f"Adult, UCI (CC BY 4.0): {len(dataset):,} people, {dataset.num_fields} fields, "
            f"{dataset.num_features} features.\n"
            f"FFM, K = {EMBED_DIM}, AdaGrad on sparse gradients, batches of {BATCH_SIZE}.\n\n"
            "  mean logloss"
        )
        ffm, history = train_ffm(dataset, console, epochs=epochs, seed=seed)
        with console.status("logistic regression"):
            fits = [ffm, fit_logistic_regression(dataset)]
        console.print(_quality_table(fits))

        console.print("[bold]How fast is the fused layer here?[/bold]")
        console.print(
            f"{workload}.\n{machine}; medians of up to {REPEATS}; ratio: fused to that line."
        )
        with console.status("timing", refresh_per_second=1) as status:
            timings = time_interaction(
                workload, seed=seed, on_start=lambda name: status.update(f"timing {name}")
            )
        console.print(_speed_table(timings))

    quality, speed = out / "quality.png", out / "speed.png"
    plot_quality(quality, history, fits)
    plot_speed(speed, timings, f"{workload}; {machine}; medians of up to {REPEATS}")
    # A long path must stay in one piece, to be copied.
    console.print("Plots:", str(quality), str(speed), sep="\n  ", soft_wrap=True)


def _quality_table(fits: Sequence[Fit]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("model")
    table.add_column("validation chose")
    for heading in ("training", "test AUC", "test logloss"):
        table.add_column(heading, justify="right")
    for fit in fits:
        table.add_row(
            *(
                fit.name,
                fit.setting,
                f"{fit.seconds:.1f} s",
                f"{fit.auc:.4f}",
                f"{fit.logloss:.4f}",
            ),
            style="bold" if fit is fits[0] else "",
        )
    return table


def _speed_table(timings: Sequence[Timing]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("samples/s")
    for heading in ("forward", "ratio", "+ backward", "ratio"):
        table.add_column(heading, justify="right")
    table.add_column("gradient")
    fused = timings[0]
    for timing in timings:
        ratios = [f"{fused.forward / timing.forward:.1f}×", f"{fused.both / timing.both:.1f}×"]
        if timing is fused:
            ratios = ["", ""]
        table.add_row(
            *(timing.name, f"{timing.forward:,.0f}", ratios[0], f"{timing.both:,.0f}", ratios[1]),
            timing.gradient,
            style="bold" if timing is fused else "",
        )
    return table


def _threads(count: int) -> str:
    return f"{count} thread{'' if count == 1 else 's'}"
