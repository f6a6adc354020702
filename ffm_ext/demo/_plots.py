# SPDX-License-Identifier: MIT
"""The demo's two pictures. No pyplot: nothing here depends on a display or changes global settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_curve

from ._timing import Timing
from ._training import Fit, History

_OURS, _THEIRS, _GREY = "#1b5e9e", "#d9822b", "#8a8f98"
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 150,
}


def plot_quality(path: Path, history: History, fits: Sequence[Fit]) -> None:
    """Logloss of every epoch, ROC curves, and how far a predicted probability can be taken at its word."""
    with rc_context(_STYLE):
        fig = Figure(figsize=(13, 4.2), layout="constrained")
        curves, roc, calibration = fig.subplots(1, 3)
        _plot_history(curves, history)
        _plot_roc(roc, fits)
        _plot_calibration(calibration, fits)
        fig.savefig(path)


def plot_speed(path: Path, timings: Sequence[Timing], subtitle: str) -> None:
    """Samples a second, forward and forward + backward."""
    with rc_context(_STYLE):
        fig = Figure(figsize=(11, 3.0), layout="constrained")
        fig.suptitle(subtitle, fontsize=9, color="#555555", x=0.01, ha="left")
        left, right = fig.subplots(1, 2, sharey=True)
        names = [timing.name for timing in timings]
        _plot_bars(left, "forward", names, [timing.forward for timing in timings])
        _plot_bars(right, "forward + backward", names, [timing.both for timing in timings])
        left.invert_yaxis()  # both: they share it
        fig.savefig(path)


def _plot_history(ax: Axes, history: History) -> None:
    epochs = np.arange(1, len(history.train) + 1)
    ax.plot(epochs, history.train, color=_GREY, marker="o", markersize=4, label="training rows")
    ax.plot(epochs, history.valid, color=_OURS, marker="o", markersize=4, label="validation rows")
    best = history.best
    ax.scatter(
        epochs[best],
        history.valid[best],
        s=120,
        c="none",
        edgecolors=_OURS,
        label=f"kept: epoch {best + 1}",
    )
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(title="Training of the FFM", xlabel="epoch", ylabel="logloss (nats)")
    ax.grid(axis="y", alpha=0.3)
    ax.legend()


def _unit_square(ax: Axes, *, diagonal: str) -> None:
    """Axes for two shares, with the line of those that are equal."""
    ax.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle=":", label=diagonal)
    ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    ax.grid(alpha=0.3)


def _plot_roc(ax: Axes, fits: Sequence[Fit]) -> None:
    # The curves lie close together: their bend once more, enlarged.
    inset = ax.inset_axes((0.42, 0.33, 0.5, 0.5), xlim=(0.08, 0.22), ylim=(0.74, 0.9))
    inset.spines[:].set_visible(True)
    inset.set(xticks=(0.1, 0.15, 0.2), yticks=(0.75, 0.8, 0.85))
    inset.tick_params(labelsize=8)
    for fit, color in zip(fits, (_OURS, _THEIRS), strict=True):
        false_rate, true_rate, _ = roc_curve(fit.target, fit.probability)
        ax.plot(false_rate, true_rate, color=color, label=f"{fit.name}, AUC {fit.auc:.4f}")
        inset.plot(false_rate, true_rate, color=color, linewidth=1)
    ax.indicate_inset_zoom(inset, edgecolor=_GREY)
    _unit_square(ax, diagonal="chance")
    ax.set(title="ROC, test rows", xlabel="false positive rate", ylabel="true positive rate")
    ax.legend(loc="lower right")


def _plot_calibration(ax: Axes, fits: Sequence[Fit]) -> None:
    _unit_square(ax, diagonal="perfect")
    for fit, color, marker in zip(fits, (_OURS, _THEIRS), "os", strict=True):
        rate, predicted = calibration_curve(
            fit.target, fit.probability, n_bins=20, strategy="quantile"
        )
        ax.plot(
            predicted, rate, color=color, marker=marker, markersize=4, linewidth=1, label=fit.name
        )
    ax.set(
        title="Calibration, test rows",
        xlabel="predicted probability (20 equal groups)",
        ylabel="share above 50,000 dollars",
    )
    ax.legend(loc="lower right")


def _plot_bars(ax: Axes, title: str, names: Sequence[str], speeds: Sequence[float]) -> None:
    bars = ax.barh(names, speeds, color=[_OURS, *[_GREY] * (len(names) - 1)], height=0.6)
    labels = [f"{speeds[0]:,.0f}"]
    labels += [f"{speed:,.0f}   (fused: {speeds[0] / speed:.1f}×)" for speed in speeds[1:]]
    ax.bar_label(bars, labels, padding=4, fontsize=9)
    ax.set(title=title, xlabel="samples a second", xlim=(0, 1.15 * max(speeds)))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", alpha=0.3)
