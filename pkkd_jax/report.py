"""One page, with all its pictures inside, of one run or of several side by side.

python -m pkkd_jax.report RUN_DIR [RUN_DIR ...] [--out=FILE] [--images=256] [--data_dir=DIR]
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import argparse
import base64
import html
import io
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from absl import logging

from pkkd_jax import analysis, config, cost, metrics, names, runs
from pkkd_jax.analysis import plots

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: 0.2em 0.9em; border-bottom: 1px solid #ccc; text-align: right; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.5em 0; } img { max-width: 100%; } figcaption { color: #444; }
pre { background: #f4f4f4; padding: 1em; overflow-x: auto; } .wide { overflow-x: auto; }
"""


def _labels(run_dirs: list[str]) -> dict[str, Path]:
    """The shortest ends of the paths that tell them apart, and not by seeds alone, to the paths."""
    paths = [Path(each).resolve() for each in run_dirs]
    if len(set(paths)) < len(paths):
        raise names.UserError(f"a run directory is named twice in {', '.join(run_dirs)}: once each")
    shortest = 2 if all(path.name.startswith("seed") for path in paths) else 1
    for count in range(shortest, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(labels)) == len(labels):
            break
    return dict(zip(labels, paths, strict=True))


def _table(head: Iterable, rows: Iterable[Iterable]) -> str:
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table>\n{line(head, "th")}\n{body}\n</table></div>'


def _picture(figure, caption: str) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    data = base64.b64encode(file.getvalue()).decode()
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _figures(run_dir: Path) -> dict[str, float]:
    """The results of a run, or what its last evaluation found; `{}` before the first."""
    results = metrics.read_json(run_dir / "results.json")
    if results:
        return results
    evaluated = [row for row in metrics.read(run_dir) if any("/top5" in key for key in row)]
    return evaluated[-1] if evaluated else {}


def _results(run_dirs: dict[str, Path]) -> str:
    head = [
        "",
        "network",
        "accuracy, %",
        "as trained, %",
        "cross-entropy",
        "images",
        "step",
        "hours",
    ]
    rows, made = [], []
    for label, run_dir in run_dirs.items():
        found = _figures(run_dir)
        places = []
        for start in found.get("starts", []):
            versions = (f"{name} {start['versions'][name]}" for name in ("jax", "pkkd_jax"))
            since = f"from step {start['step']:,} on: " if places else ""
            places.append(since + ", ".join([start["device"], *versions]))
        made.append(f"{label}: {', '.join(places) or 'not finished'}")
        step = found.get("steps", found.get("step", 0))
        for which in ("student", "teacher"):
            for split in ("test", "validation"):
                name = f"{split}/{which}"
                if f"{name}/accuracy" in found:
                    figures = (found[f"{name}/{k}"] for k in ("accuracy", "accuracy_uncalibrated"))
                    hours = f"{found.get('wall_s', 0) / 3600:.2f}"
                    rows.append(
                        [label, which, *(f"{100 * figure:.2f}" for figure in figures),
                         f"{found[f'{name}/loss']:.4f}", split, f"{step:,}", hours]
                    )  # fmt: skip
    return _table(head, rows) + f"<p>{html.escape('; '.join(made))}.</p>"


def _configurations(run_dirs: dict[str, Path]) -> str:
    configs = {label: runs.read_config(run_dir) for label, run_dir in run_dirs.items()}
    (first, one), *others = configs.items()
    parts = []
    for label, other in others:
        differing = config.differences(one, other) or ["nothing but the directory"]
        text = html.escape(f"{first} (there) and {label} (here) differ in: " + "; ".join(differing))
        parts.append(f"<p>{text}.</p>")
    for label, each in configs.items():
        text = html.escape(json.dumps(each, indent=2))
        parts.append(f"<details><summary>{html.escape(label)}</summary><pre>{text}</pre></details>")
    return "\n".join(parts)


def _cost(run: analysis.Run, image_shape: tuple[int, ...]) -> str:
    counted, line = cost.described(runs.network_arguments(run.config, "student"), image_shape)
    if not counted:
        return f"<p>{html.escape(line)}</p>"
    head, *rows = cost.totals(counted)
    notes = " ".join(cost.notes(counted))
    return _table(head, rows) + f"<p>{html.escape(notes)}</p>"


def _pictures(run_dir: Path, run: analysis.Run, stages, images, labels, trust) -> list[str]:
    """Pictures of one run, as far as its networks have what they show."""
    parts = []
    weights = {which: analysis.filters(network) for which, network in run.networks.items()}
    if analysis.shared_layers(weights):
        caption = (
            "Filters with maximum-likelihood fits of Gauss and Laplace, and Vuong's z: positive"
            " where the Laplacian is nearer."
        )
        parts.append(_picture(plots.filter_histograms(weights), caption))
    taps = list(stages["raw"]["student"])
    if taps:
        histograms = plots.response_histograms(stages, taps[len(taps) // 2])
        parts.append(_picture(histograms, "Responses, stage by stage."))
    history = analysis.sigma_history(run_dir)
    if history:
        parts.append(_picture(plots.sigmas(history), "Bandwidths of the kernels in training."))
    if all(stages["raw"].get(which) for which in ("student", "teacher")):
        found, *names_of = analysis.along(run_dir, images, trust=trust)
        maps = plots.cka_heatmaps({f"step {k:,}": each for k, each in found.items()}, *names_of)
        caption = "Linear CKA of raw responses of all convolutions, student against teacher."
        parts.append(_picture(maps, caption))
    points = analysis.penultimate(run, images, "tsne")
    if points:
        scatter = plots.class_scatter(points, labels)
        parts.append(_picture(scatter, "The classifier's input in two dimensions, by t-SNE."))
    behind = [layer for layer in weights["student"] if layer != "stem"]
    if behind:
        first = plots.filter_images(weights["student"][behind[0]], behind[0])
        parts.append(_picture(first, "The student's first filters behind the stem."))
    return parts


def _numbers(label: str, network: analysis.Network, which: str, shares, linear, alike) -> list:
    filters = analysis.filters(network)
    fits = [analysis.fit(each).better for layer, each in filters.items() if layer != "stem"]
    zeros = list(shares.values())[1:]  # the first layer's are the images
    return [
        label,
        which,
        *(fits.count(kind) for kind in ("laplace", "gauss", "neither")),
        f"{np.mean(zeros):.1%}" if zeros else "",
        f"{np.mean(list(linear.values())):.3f}" if linear else "",
        *(
            f"{np.mean(list(alike[stage].values())):.3f}"
            if which == "student" and alike.get(stage)
            else ""
            for stage in ("raw", "kernel", "rho")
        ),
    ]


def write(
    run_dirs: list[str], out: str | Path, images: int = 0, data_dir: str = "", trust: bool = False
) -> Path:
    """Writes the page.

    Args:
      run_dirs: directories that trainings wrote, finished or not.
      out: the file.
      images: number of unseen images whose responses are looked at, as of `analysis.examples`.
      data_dir: where the data sets' files are; the runs' own places if "".
      trust: whether what the runs name from outside the package is imported.
    Returns:
      The path of the page.
    Raises:
      UserError: if there is no such run, or its data set is not there.
    """
    labelled = _labels(run_dirs)
    loaded = {label: analysis.load(run_dir, trust=trust) for label, run_dir in labelled.items()}
    if not Path(out).parent.is_dir():  # before minutes are spent
        raise names.UserError(f"--out={out}: its directory is not there; make it or choose another")
    similarity, zeros, linear, numbers, costs, pictures, counts = {}, {}, {}, [], {}, [], set()
    for label, run in loaded.items():
        judge = "validation" if run.config["data"].get("validation") else "test"
        seen, classes = analysis.examples(run, images, judge, data_dir, trust)
        counts.add(f"{len(seen)} {judge}")
        stages = analysis.responses(run, seen)
        alike = analysis.similarities(stages)
        prefix = f"{label}, " if len(loaded) > 1 else ""
        similarity |= {f"{prefix}{stage}": line for stage, line in alike.items() if line}
        for which, network in run.networks.items():
            zeros[prefix + which] = shares = analysis.zero_shares(network, seen)
            signs = analysis.linear_shares(network, seen)
            linear |= {prefix + which: signs} if signs else {}
            numbers.append(_numbers(label, network, which, shares, signs, alike))
        costs.setdefault(_cost(run, seen.shape[1:]), []).append(html.escape(label))
        heading = f"<h3>{html.escape(label)}, step {run.step:,}</h3>"
        pictures += [heading, *_pictures(labelled[label], run, stages, seen, classes, trust)]
    head = ["", "network", "layers nearer Laplace", "nearer Gauss", "neither", "zeros",
            "explained by signs",
            "CKA with the teacher, raw", "after the kernel", "after rho"]  # fmt: skip
    together = [_table(head, numbers)]
    if similarity:
        lines = plots.by_layer(similarity, "linear CKA", (0, 1))
        together.append(_picture(lines, "Similarity of student and teacher, tap by tap."))
    lines = plots.by_layer(zeros, "exactly zero (fraction)", (0, 1))
    together.append(_picture(lines, "Share of exactly zero features that each layer is given."))
    if linear:
        lines = plots.by_layer(linear, "squared correlation", (0, 1))
        text = "Responses of adder layers: share that their filters' signs alone explain."
        together.append(_picture(lines, text))
    curves = plots.learning_curves(labelled if len(labelled) > 1 else {"": run_dirs[0]})
    sections = {
        "Results": [_results(labelled)],
        "Curves": [_picture(curves, "Cross-entropy and accuracy in training.")],
        "Cost of one image": [f"<h3>{', '.join(who)}</h3>{what}" for what, who in costs.items()],
        f"Features and filters, {' and '.join(sorted(counts))} images": together,
        "Kernel space": pictures,
        "Configuration": [_configurations(labelled)],
    }
    body = [line for name, parts in sections.items() for line in (f"<h2>{name}</h2>", *parts)]
    title = html.escape("pkkd_jax: " + ", ".join(loaded))
    page = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        f"<title>{title}</title><style>{STYLE}</style></head>",
        f"<body><h1>{title}</h1>",
        *body,
        "</body></html>\n",
    ]
    try:
        Path(out).write_text("\n".join(page), encoding="utf-8")
    except OSError as error:
        text = f"--out={out} cannot be written: {error.strerror}; choose another"
        raise names.UserError(text) from error
    return Path(out)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    logging.set_verbosity(logging.FATAL)
    parser = argparse.ArgumentParser("python -m pkkd_jax.report", allow_abbrev=False)
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR")
    parser.add_argument("--out", default="", help="default: report.html in the first run directory")
    parser.add_argument("--images", type=int, default=0, help="unseen ones; default: 256 or fewer")
    parser.add_argument("--data_dir", default="", help="where the data sets' files are")
    parser.add_argument("--trust", action="store_true", help="import what runs name from outside")
    given = parser.parse_args(argv)
    out = given.out or Path(given.run_dirs[0]) / "report.html"
    try:
        path = write(given.run_dirs, out, given.images, given.data_dir, given.trust)
    except (names.UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path}, {path.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
