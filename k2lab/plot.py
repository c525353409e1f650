"""One look for every figure: style, palette, and the only way to write to figures/.

Plot functions take data and an ax. No titles: the caption in the notebook carries the message.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython import get_ipython
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colour-blind-safe palette (https://jfly.uni-koeln.de/color/). The three
ADAMW, MUON, MUONCLIP = "#0072B2", "#D55E00", "#009E73"
# optimizers keep their colours in every figure, so they come first; yellow is left out as it
# fades on white.
OKABE_ITO = [ADAMW, MUON, MUONCLIP, "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
LINESTYLES = ["-", "-.", (0, (1, 1)), (0, (5, 1)), "-", "-.", (0, (1, 1))]

# What to pass to ax.plot for a known arm: ax.plot(x, y, **plot.ARMS["Muon"]).
ARMS = {
    "AdamW": {"color": ADAMW, "linestyle": LINESTYLES[0]},
    "Muon": {"color": MUON, "linestyle": LINESTYLES[1]},
    "MuonClip": {"color": MUONCLIP, "linestyle": LINESTYLES[2]},
}
PAPER = {"color": "0.45", "linestyle": "--", "linewidth": 1.0}  # paper values and thresholds

NAME = re.compile(r"[0-9]{2}_[a-z0-9]+(_[a-z0-9]+)*")
METADATA = {"Software": None}  # matplotlib's version would change the file without the picture


def use_style() -> None:
    """Set the look of every figure: call it once, in the set-up cell."""
    sns.set_theme(context="notebook", style="ticks")
    mpl.rcParams.update(
        {
            "figure.figsize": (6.4, 3.6),
            "figure.dpi": 100,  # inline; keeps a notebook with six figures well under 1 MB
            "savefig.dpi": 150,
            "savefig.bbox": "tight",
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "axes.labelsize": 10,
            "axes.titlesize": 10,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "legend.fontsize": 9,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": mpl.cycler(color=OKABE_ITO, linestyle=LINESTYLES),
        }
    )
    if get_ipython() is not None:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("png", metadata=METADATA)


def save(fig: Figure, name: str) -> None:
    """Show fig once, here, and in full mode write it to figures/<name>.png.

    name: number of the notebook and a slug, such as "11_load_balance".
    Raises ValueError for another form of name, for a figure title (panels may have one), and
    before `notebook.banner`, which decides by the mode where figures go.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r}: name a figure NN_slug in lower case, such as '11_load'")
    if fig.get_suptitle() or (len(fig.axes) == 1 and fig.axes[0].get_title()):
        raise ValueError(f"{name}: remove the title; the caption below the figure carries it")
    folder = os.environ.get("K2LAB_FIGURES")
    if folder is None:
        raise ValueError("call notebook.banner(...) in the set-up cell, before plot.save")
    if folder:
        _write(fig, Path(folder) / f"{name}.png")
    plt.close(fig)  # or the inline backend would show it a second time
    if get_ipython() is not None:
        display(fig)


def _write(fig: Figure, path: Path) -> None:
    """Write a PNG whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        fig.savefig(temporary, metadata=METADATA)
        os.replace(temporary, path)


def seeds(
    ax: Axes,
    frame: pd.DataFrame,
    x: str,
    y: str,
    *,
    seed: str = "seed",
    label: str | None = None,
    **style,
) -> None:
    """Draw every seed as a thin line and their mean as a thick one.

    frame: long form, with columns x, y and seed, one row per point.
    label: name of the arm; one in `ARMS` brings its colour and line style.
    Raises ValueError for a missing column and for an empty frame.
    """
    if missing := [column for column in (x, y, seed) if column not in frame]:
        raise ValueError(f"no column {', '.join(missing)}; the frame has {', '.join(frame)}")
    if frame.empty:
        raise ValueError("the frame is empty; give at least one point")
    mean = frame.groupby(x)[y].mean()
    (line,) = ax.plot(mean.index, mean, label=label, **{**ARMS.get(label, {}), **style})
    for _, run in frame.groupby(seed):
        run = run.sort_values(x)
        thin = {"linewidth": 0.6, "alpha": 0.5, "label": "_seed", "linestyle": "-"}
        ax.plot(run[x], run[y], color=line.get_color(), zorder=line.get_zorder() - 1, **thin)


def paper_line(ax: Axes, y: float, label: str) -> None:
    """Draw a value or threshold of the paper as a grey dashed line with its label at the left."""
    ax.axhline(y, label=f"_{label}", **PAPER)
    ax.annotate(
        label,
        (0, y),
        (4, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        color=PAPER["color"],
        fontsize=9,
    )


def direct_label(ax: Axes, *, fontsize: float = 9) -> None:
    """Write each line's label at its right end, moved apart where ends meet; instead of a legend.

    Call it last, when the limits are final. Raises ValueError for no or more than four labels.
    """
    lines = [line for line in ax.get_lines() if not str(line.get_label()).startswith("_")]
    if not 1 <= len(lines) <= 4:
        raise ValueError(f"{len(lines)} labelled lines; label 1 to 4, or use ax.legend()")
    ends = []
    for line in lines:
        points = np.column_stack([line.get_xdata(), line.get_ydata()]).astype(float)
        points = points[np.isfinite(points).all(axis=1)]
        if not len(points):
            raise ValueError(f"line {line.get_label()!r} has no finite point to label")
        x, y = points[points[:, 0].argmax()]
        ends.append((ax.transData.transform((x, y))[1], x, y, line))
    gap = fontsize * 1.2 * ax.figure.dpi / 72  # one line of text, in pixels
    floor = -np.inf
    for pixel, x, y, line in sorted(ends, key=lambda end: end[0]):
        floor = max(pixel, floor + gap)
        ax.annotate(
            line.get_label(),
            (x, y),
            (5, (floor - pixel) * 72 / ax.figure.dpi),
            textcoords="offset points",
            color=line.get_color(),
            fontsize=fontsize,
            va="center",
            annotation_clip=False,
        )
