"""Style, the only writer of figures, and the labels."""

import colorsys
import itertools

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from k2lab import plot


@pytest.fixture(autouse=True)
def _style():
    with mpl.rc_context():
        plot.use_style()
        yield
        plt.close("all")


@pytest.fixture
def ax():
    return plt.subplots()[1]


def draw(ax, labels):
    for i, label in enumerate(labels):
        ax.plot([0, 1, 2], [0, 1, 2 + 0.001 * i], label=label)


def test_save_writes_once_and_the_same_bytes(tmp_path, monkeypatch, ax):
    monkeypatch.setenv("K2LAB_FIGURES", str(tmp_path))
    draw(ax, ["a"])
    plot.save(ax.figure, "11_loss")
    (path,) = tmp_path.iterdir()
    first = path.read_bytes()
    assert path.name == "11_loss.png" and first[:4] == b"\x89PNG"
    assert b"Software" not in first and b"matplotlib" not in first
    assert plt.get_fignums() == []  # closed, or a notebook would show it twice
    plot.save(ax.figure, "11_loss")
    assert path.read_bytes() == first


def test_save_writes_nothing_in_fast_mode(tmp_path, monkeypatch, ax):
    monkeypatch.setenv("K2LAB_FIGURES", "")
    monkeypatch.chdir(tmp_path)
    plot.save(ax.figure, "11_loss")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["loss", "1_loss", "11-loss", "11_Loss", "11_loss.png", "11_a/b"])
def test_save_refuses_a_name_of_another_form(tmp_path, monkeypatch, ax, name):
    monkeypatch.setenv("K2LAB_FIGURES", str(tmp_path))
    with pytest.raises(ValueError, match="NN_slug"):
        plot.save(ax.figure, name)
    assert list(tmp_path.iterdir()) == []


def test_save_needs_the_banner_and_refuses_titles(monkeypatch, ax):
    with pytest.raises(ValueError, match=r"notebook\.banner"):
        plot.save(ax.figure, "11_loss")
    ax.set_title("Loss")
    with pytest.raises(ValueError, match="title"):
        plot.save(ax.figure, "11_loss")


def test_palette_keeps_the_optimizers_and_can_be_told_apart_without_colour():
    assert [arm["color"] for arm in plot.ARMS.values()] == ["#0072B2", "#D55E00", "#009E73"]
    assert len({str(arm["linestyle"]) for arm in plot.ARMS.values()}) == 3
    assert len(set(plot.OKABE_ITO)) == len(plot.OKABE_ITO) == len(plot.LINESTYLES)
    grey = mpl.colors.to_rgb(plot.PAPER["color"])
    assert colorsys.rgb_to_hsv(*grey)[1] == 0 and plot.PAPER["linestyle"] == "--"


def test_direct_labels_stand_apart_and_keep_their_order(ax):
    draw(ax, ["low", "mid", "high", "top"])
    plot.direct_label(ax)
    ax.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert [text.get_text() for text in ax.texts] == ["low", "mid", "high", "top"]
    assert all(a.y1 <= b.y0 + 1 for a, b in itertools.pairwise(boxes))
    assert [t.get_color() for t in ax.texts] == [line.get_color() for line in ax.get_lines()]


@pytest.mark.parametrize("labels", [[], ["a", "b", "c", "d", "e"], ["_hidden"]])
def test_direct_label_refuses_no_and_five_lines(ax, labels):
    draw(ax, labels)
    with pytest.raises(ValueError, match="label 1 to 4"):
        plot.direct_label(ax)


def test_direct_label_ignores_trailing_nan_and_refuses_all_nan(ax):
    ax.plot([0, 1, 2], [0, 1, np.nan], label="a")
    plot.direct_label(ax)
    assert ax.texts[0].xy == (1.0, 1.0)
    ax.plot([0, 1], [np.nan, np.nan], label="b")
    with pytest.raises(ValueError, match="'b' has no finite point"):
        plot.direct_label(ax)


def test_seeds_draws_each_thin_and_the_mean_thick(ax):
    frame = pd.DataFrame({"step": [0, 1] * 3, "loss": [3, 2, 4, 3, 5, 1], "seed": [0, 0, 1, 1, 2, 2]})
    plot.seeds(ax, frame, "step", "loss", label="Muon")
    mean, *thin = ax.get_lines()
    assert list(mean.get_ydata()) == [4.0, 2.0]
    assert mean.get_label() == "Muon" and mean.get_color() == plot.MUON
    assert [list(line.get_ydata()) for line in thin] == [[3, 2], [4, 3], [5, 1]]
    assert all(line.get_linewidth() < mean.get_linewidth() for line in thin)
    plot.direct_label(ax)  # only the mean has a label
    assert [text.get_text() for text in ax.texts] == ["Muon"]


def test_seeds_refuses_missing_columns_and_empty_frames(ax):
    frame = pd.DataFrame({"step": [0], "loss": [1.0]})
    with pytest.raises(ValueError, match="no column seed; the frame has step, loss"):
        plot.seeds(ax, frame, "step", "loss")
    with pytest.raises(ValueError, match="empty"):
        plot.seeds(ax, frame.assign(seed=0)[:0], "step", "loss")


def test_paper_line_is_grey_dashed_and_labelled(ax):
    plot.paper_line(ax, 100.0, "paper: 100")
    (line,) = ax.get_lines()
    assert line.get_linestyle() == "--" and list(line.get_ydata()) == [100.0, 100.0]
    assert [text.get_text() for text in ax.texts] == ["paper: 100"]
