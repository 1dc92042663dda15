"""A table's finished cells as Markdown, and as a plot."""

import collections
import functools
import itertools
import math
import statistics
import tomllib
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
COLOURS = {"ours": "#0072B2", "published": "#D55E00"}  # Okabe and Ito: safe for colour-blind eyes
LINES = [
    {"color": colour, "linestyle": style}
    for style in ("-", "--", ":", "-.")
    for colour in ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
]


@functools.cache
def _published() -> dict:
    return tomllib.loads((HERE / "published.toml").read_text())


def published(table: str, row: str, column: str) -> list[tuple]:
    """Published accuracies in percent, each with the key of its source and maybe top-5 accuracy."""
    figures = _published()
    return [tuple(each) for each in figures.get(table, {}).get(row, {}).get(column, [])]


def _spread(values: list[float], digits: int = 2) -> str:
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return ""
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def markdown(table: dict, found: dict, command: str) -> str:
    """The table, and below it where its figures come from."""
    sources, lines = {}, []
    names = _published()["sources"]
    for column in table["columns"]:
        known = {row: published(table["name"], row, column) for row in table["rows"]}
        top5 = any(len(each) > 2 for figures in known.values() for each in figures)
        lines += [
            f"**{column}**" + ", top-5 in brackets" * top5,
            "",
            "| | KD added | accuracy, % | as trained, % | in training, % | teacher, %"
            " | published, % | runs | epoch, s |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in table["rows"]:
            cells = found[row, column]
            for _, source, *_ in known[row]:
                sources.setdefault(source, len(sources) + 1)
            accuracy = _spread([c["accuracy"] for c in cells])
            if accuracy and top5:
                accuracy += f" ({_spread([c['top5'] for c in cells])})"
            times = [c["epoch_s"] for c in cells]
            values = [
                row,
                table["rows"][row]["kd"],
                accuracy or ("" if table["rows"][row]["published_only"] else "not run"),
                _spread([c["uncalibrated"] for c in cells]),
                _spread([c["training"] for c in cells]),
                _spread([c["teacher"] for c in cells]),
                ", ".join(
                    f"{value:.2f}{''.join(f' ({each:.2f})' for each in more)} [{sources[source]}]"
                    for value, source, *more in known[row]
                ),
                str(len(cells)),
                _spread(times, 0) if len({c["device"] for c in cells}) == 1 else "",
            ]
            lines.append(f"| {' | '.join(values)} |")
        lines.append("")
    every = [cell for cells in found.values() for cell in cells]
    text = [f"# {table['title']}", "", *lines]
    if every:
        judges = sorted({f"{cell['judge']} images" for cell in every})
        steps = sorted({(cell["steps"], cell["batch_size"]) for cell in every})
        schedules = [f"{count:,} steps of {images} images" for count, images in steps]
        hours = sum(cell["wall_s"] for cell in every) / 3600
        text += [
            f"Accuracy of the student on {' or '.join(judges)}, BatchNorm's statistics recalibrated"
            " (as trained: not), and on augmented training images in the later half of the steps"
            " between the last two evaluations; mean ± standard deviation over runs. Seconds of an"
            " epoch's steps at the rate of the fastest tenth, where all runs of a row were made on"
            " one device, which may be another in the next row.",
            "",
            *_places(every),
            "",
            f"- {len(every)} {'runs' if len(every) > 1 else 'run'} of {' or '.join(schedules)},"
            f" {hours:.2f} h",
        ]
    text += [
        f"- `{command}`",
        *(f"- [{number}] {names[source]}" for source, number in sources.items()),
    ]
    return "\n".join(text) + "\n"


def _places(cells: list[dict]) -> list[str]:
    """A table of devices and versions, with how many runs were made there, or parts of runs."""
    starts = [start for cell in cells for start in cell["starts"]]
    names = list(dict.fromkeys(name for start in starts for name in start["versions"]))
    runs: dict[tuple, collections.Counter] = collections.defaultdict(collections.Counter)
    for cell in cells:
        for start, after in itertools.zip_longest(cell["starts"], cell["starts"][1:]):
            steps = f" from step {start['step']:,}" if start["step"] else ""
            steps += f" to step {after['step']:,}" if after else ""
            place = start["device"], *(start["versions"].get(name, "") for name in names)
            runs[place][steps] += 1
    lines = [["runs", "device", *names], ["---"] * (2 + len(names))]
    for place, parts in sorted(runs.items()):
        lines.append(["; ".join(f"{parts[steps]}{steps}" for steps in sorted(parts)), *place])
    return [f"| {' | '.join(line)} |" for line in lines]


def plot(table: dict, found: dict, path: Path) -> None:
    """Accuracy of each row, with what was published beside it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns, rows = table["columns"], list(table["rows"])
    size = 3 + 4 * len(columns), 1.2 + 0.35 * len(rows)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    every = figure.subplots(1, len(columns), squeeze=False)[0]
    for column, axes in zip(columns, every, strict=True):
        for y, row in enumerate(rows):
            values = [cell["accuracy"] for cell in found[row, column]]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else 0
                mean = statistics.mean(values)
                axes.errorbar(mean, y, xerr=spread, fmt="o", color=COLOURS["ours"])
            for value, *_ in published(table["name"], row, column):
                axes.plot(value, y, "D", mfc="none", color=COLOURS["published"])
        axes.set(xlabel=f"accuracy on {column} (%)", yticks=range(len(rows)), ylim=(len(rows), -1))
        axes.set_yticklabels(rows if column == columns[0] else [])
        axes.grid(alpha=0.3)
    figure.suptitle(f"{table['title']}\nfilled: here, open: published", fontsize=9)
    figure.savefig(path, dpi=120)


def plot_curves(table: dict, found: dict, path: Path) -> None:
    """Each row's first run: accuracy, how far that in training is above it, and what recalibrating
    BatchNorm adds to it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = table["columns"]
    figure = Figure(figsize=(16, 1 + 4.5 * len(columns)), layout="constrained")
    FigureCanvasAgg(figure)
    every = figure.subplots(len(columns), 3, squeeze=False)
    for column, (accuracy, gap, gain) in zip(columns, every, strict=True):
        for row, line in zip(table["rows"], itertools.cycle(LINES), strict=False):
            for cell in found[row, column][:1]:
                steps, recalibrated, raw, train = map(np.array, zip(*cell["curve"], strict=True))
                accuracy.plot(steps, recalibrated, label=row, **line)
                accuracy.plot(steps, train, color=line["color"], alpha=0.4, linewidth=0.8)
                gap.plot(steps, train - recalibrated, **line)
                gain.plot(steps, recalibrated - raw, **line)
        accuracy.set(xlabel="step", ylabel=f"accuracy on {column}, thin: in training (%)")
        gap.set(xlabel="step", ylabel="in training - on new images (points)")
        gain.set(xlabel="step", ylabel="recalibrated - as trained (points)")
        for axes in (accuracy, gap, gain):
            axes.grid(alpha=0.3)
    figure.legend(*every[0, 0].get_legend_handles_labels(), loc="outside right", fontsize=8)
    figure.savefig(path, dpi=120)


def write(path: Path, table: dict, found: dict, command: str) -> str:
    """Writes `path.md`, `path.png` and `path-curves.png`, and returns the Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = markdown(table, found, command)
    Path(f"{path}.md").write_text(text)
    plot(table, found, Path(f"{path}.png"))
    plot_curves(table, found, Path(f"{path}-curves.png"))
    return text
