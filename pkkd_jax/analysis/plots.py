"""Pictures of runs, one function each, which return a `matplotlib.figure.Figure`.

Lines differ in colour (Okabe and Ito's, safe for colour-blind eyes), style and marker, so that they
can be told apart in grey.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pkkd_jax import metrics
from pkkd_jax.analysis.similarity import effective_rank
from pkkd_jax.analysis.weights import fit, shared_layers
from pkkd_jax.names import UserError

COLOURS = ("#0072B2", "#E69F00", "#000000", "#CC79A7", "#009E73", "#D55E00", "#56B4E9")
STYLES = [
    {"color": colour, "linestyle": style, "marker": marker, "markersize": 4}
    for style in ("-", "--", ":")
    for colour, marker in zip(COLOURS, "os^Dv*P", strict=True)
]
SEQUENTIAL = "cividis"


def _figure(rows: int, columns: int, width: float, height: float, **options):
    """A figure and its axes, `[rows, columns]`, each of `width` by `height` inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _legend_below(figure, axes):
    """The legend of `axes` below all axes, where labels may be many and long."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.set_figheight(figure.get_figheight() + 0.2 * len(handles))
        figure.legend(handles, labels, loc="outside lower center", fontsize="small")


def learning_curves(run_dirs: Mapping[str, str | Path]):
    """Cross-entropy and accuracy by step.

    Args:
      run_dirs: label to run directory. Of one run, images that were seen in training and unseen
        ones; of several, unseen ones alone.
    """
    figure, ((loss, accuracy),) = _figure(1, 2, 5, 4)
    for (label, run_dir), line in zip(run_dirs.items(), itertools.cycle(STYLES), strict=False):
        rows = metrics.read(Path(run_dir))
        for network, style in (("student", "-"), ("teacher", "--")):
            for split in ("train", "test", "validation"):
                if split == "train" and len(run_dirs) > 1:
                    continue
                for axes, what in ((loss, "loss"), (accuracy, "accuracy")):
                    name = f"{split}/{network}/{what}"
                    if name == "train/student/loss":
                        name += "_ce"  # comparable with the other three: without the distillation
                    points = [(row["step"], row[name]) for row in rows if name in row]
                    if points:
                        axes.plot(
                            *zip(*points, strict=True),
                            linestyle=style,
                            marker="" if split == "train" else line["marker"],
                            markersize=4,
                            color=line["color"],
                            label=", ".join(filter(None, [label, network, split])),
                        )
    loss.set_yscale("log")
    for axes, label in ((loss, "cross-entropy (nats)"), (accuracy, "accuracy (fraction)")):
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
    _legend_below(figure, loss)
    return figure


def by_layer(lines: Mapping[str, Mapping[str, float]], quantity: str, limits=None):
    """A quantity by layer, one line for each label.

    Args:
      lines: label -> layer or tap -> value.
      quantity: what it is, with its unit.
      limits: lowest and highest value shown.
    """
    layers = list(dict.fromkeys(layer for line in lines.values() for layer in line))
    figure, ((axes,),) = _figure(1, 1, max(5, 1.5 + 0.3 * len(layers)), 4)
    for (label, line), style in zip(lines.items(), itertools.cycle(STYLES), strict=False):
        axes.plot(
            [layers.index(layer) for layer in line], list(line.values()), label=label, **style
        )
    axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize="small")
    axes.set(ylabel=quantity, ylim=limits)
    axes.grid(alpha=0.3)
    _legend_below(figure, axes)
    return figure


def filter_histograms(
    networks: Mapping[str, Mapping[str, np.ndarray]], layers: list[str] | None = None
):
    """Distributions of filters, with maximum-likelihood fits of Gauss and Laplace.

    Args:
      networks: label -> layer -> filters, side by side, such as `analysis.filters` of a CNN and of
        an ANN.
      layers: rows; the second, the middle and the last that all have, if None.
    Raises:
      UserError: if there is none.
    """
    from scipy import stats

    if layers is None:
        shared = shared_layers(networks)
        if not shared:
            raise UserError(f"{', '.join(networks)} have no layer of filters in common: name some")
        layers = list(
            dict.fromkeys(shared[i] for i in (min(1, len(shared) - 1), len(shared) // 2, -1))
        )
    figure, grid = _figure(len(layers), len(networks), 4, 2.4)
    for row, layer in zip(grid, layers, strict=True):
        for axes, (label, filters) in zip(row, networks.items(), strict=True):
            values = filters[layer].ravel()
            found = fit(values)
            low, high = np.quantile(values, (0.001, 0.999))
            x = np.linspace(low, high, 400)
            axes.hist(
                values, bins=60, range=(low, high), density=True, color="0.8", label="filters"
            )
            gauss = stats.norm.pdf(x, found.mean, found.std)
            laplace = stats.laplace.pdf(x, found.median, found.scale)
            axes.plot(x, gauss, "--", color=COLOURS[1], label="Gauss")
            axes.plot(x, laplace, "-", color=COLOURS[0], label="Laplace")
            verdict = {"neither": "neither is nearer"}.get(found.better, f"nearer: {found.better}")
            axes.set_title(f"{label}, {layer}\n{verdict}, z = {found.z:.1f}", fontsize="small")
            axes.set(xlabel="weight", ylabel="density")
    grid[0][0].legend(fontsize="small")
    return figure


def response_histograms(stages: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]], tap: str):
    """Distributions of the responses at a tap, stage by stage.

    Args:
      stages: what `analysis.responses` returns.
      tap: one of its taps.
    Raises:
      UserError: if there is no such tap.
    """
    networks = next(iter(stages.values()))
    if tap not in networks["student"]:
        raise UserError(f"{tap=}: the taps are {', '.join(networks['student'])}")
    figure, grid = _figure(len(networks), len(stages), 3.6, 2.4)
    units = {"raw": "response", "kernel": "response after the kernel", "rho": "response after rho"}
    for row, network in zip(grid, networks, strict=True):
        for axes, (stage, found) in zip(row, stages.items(), strict=True):
            if tap not in found[network]:  # of another architecture
                axes.set_axis_off()
                continue
            values = found[network][tap]
            axes.hist(values.ravel(), bins=80, color=COLOURS[0 if network == "student" else 1])
            axes.set_yscale("log")
            rank, channels = effective_rank(values), values.shape[-1]
            title = f"{network}, effective rank {rank:.1f} of {channels}"
            axes.set_title(title, fontsize="small")
            axes.set(xlabel=units.get(stage, stage), ylabel="count")
            axes.ticklabel_format(axis="x", scilimits=(-3, 4))
    figure.suptitle(tap, fontsize="medium")
    return figure


def cka_heatmaps(matrices: Mapping[str, np.ndarray], rows: list[str], columns: list[str]):
    """CKA of taps against taps.

    Args:
      matrices: title to CKA `[rows, columns]`, such as `analysis.cka` at several steps of a run.
      rows: the student's taps.
      columns: the teacher's.
    """
    wide = min(2, len(matrices))
    high = -(-len(matrices) // wide)
    size = 1.6 + 0.22 * len(columns), 2.6 + 0.22 * len(rows)
    figure, grid = _figure(high, wide, *size, sharey=True)
    for axes in grid.ravel()[len(matrices) :]:
        axes.set_axis_off()
    for axes, (title, matrix) in zip(grid.ravel(), matrices.items(), strict=False):
        image = axes.imshow(matrix, vmin=0, vmax=1, cmap=SEQUENTIAL)
        if rows == columns:
            title += f" (diagonal {np.diag(matrix).mean():.2f})"
        axes.set_title(title, fontsize="small")
        axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize="x-small")
        axes.set_yticks(range(len(rows)), rows, fontsize="x-small")
        axes.set_xlabel("teacher")
    for axes in grid[:, 0]:
        axes.set_ylabel("student")
    figure.colorbar(image, ax=grid, label="CKA", shrink=0.8)
    return figure


def class_scatter(points: Mapping[str, np.ndarray], labels: np.ndarray, origin: bool = False):
    """Examples in two dimensions, marked by the number of their class.

    Args:
      points: label -> `[n, 2]`, such as `analysis.embedding` of two networks' features.
      labels: int `[n]`.
      origin: whether it is marked, about which the features of a network that has two lie.
    """
    import matplotlib

    figure, (line,) = _figure(1, len(points), 5, 5)
    classes = np.unique(labels)
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(classes)))
    for axes, (label, each) in zip(line, points.items(), strict=True):
        for number, colour in zip(classes, colours, strict=True):
            here = each[labels == number]
            axes.scatter(*here.T, s=28, marker=f"${number}$", color=colour, linewidths=0.3)
        if origin:
            axes.plot(0, 0, "+", color="0.3", markersize=16, zorder=0)
        axes.set(title=label, xlabel="first coordinate", ylabel="second coordinate")
    return figure


def filter_images(filters: np.ndarray, title: str = ""):
    """Filters as small pictures, a row for each filter and a column for each of its channels.

    Args:
      filters: `[kh, kw, c_in, c_out]`, of which at most 16 filters and 16 channels are shown.
      title: above the picture.
    """
    shown = np.asarray(filters)[:, :, :16, :16]
    kh, kw, channels, count = shown.shape
    canvas = np.full((count * (kh + 1) - 1, channels * (kw + 1) - 1), np.nan)
    for i, j in itertools.product(range(count), range(channels)):
        canvas[i * (kh + 1) :, j * (kw + 1) :][:kh, :kw] = shown[:, :, j, i]
    figure, ((axes,),) = _figure(1, 1, 1.5 + canvas.shape[1] / 14, 0.8 + canvas.shape[0] / 14)
    bound = np.nanquantile(np.abs(canvas), 0.99)  # a few large weights would hide the others
    image = axes.imshow(canvas, cmap=SEQUENTIAL, vmin=-bound, vmax=bound)
    axes.set_xticks(
        kw / 2 - 0.5 + np.arange(channels) * (kw + 1), range(channels), fontsize="x-small"
    )
    axes.set_yticks(kh / 2 - 0.5 + np.arange(count) * (kh + 1), range(count), fontsize="x-small")
    axes.set(xlabel="channel", ylabel="filter", title=title)
    figure.colorbar(image, label="weight", shrink=0.8, extend="both")
    return figure


def sigmas(history: Mapping[str, Mapping[str, np.ndarray]]):
    """How PKKD's sigmas moved in training, by what `analysis.sigma_history` returns."""
    figure, (line,) = _figure(1, 2, 5, 4)
    for axes, network in zip(line, ("student", "teacher"), strict=True):
        for (tap, found), style in zip(history.items(), itertools.cycle(STYLES), strict=False):
            every = max(1, len(found["step"]) // 8)
            axes.plot(found["step"], found[network], label=tap, markevery=every, **style)
        axes.set(xlabel="step", ylabel=f"sigma of the {network}'s kernel", ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.legend(
        *line[0].get_legend_handles_labels(), loc="outside right center", fontsize="small"
    )
    return figure
