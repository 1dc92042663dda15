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
from pkkd_jax.distill.taps import select_taps

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: 0.2em 0.9em; border-bottom: 1px solid #ccc; text-align: right; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.5em 0; } img { max-width: 100%; } figcaption { color: #444; }
pre { background: #f4f4f4; padding: 1em; overflow-x: auto; } .wide { overflow-x: auto; }
"""
CHECKPOINTS = 4  # at most, in the heat maps of similarity along a run


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
    evaluated = [row for row in metrics.read(run_dir) if any("/top5" in key for key in row)]
    return metrics.read_json(run_dir / "results.json") or (evaluated[-1] if evaluated else {})


def _results(run_dirs: dict[str, Path]) -> str:
    head = [
        "",
        "network",
        "accuracy, %",
        "as trained, %",
        "cross-entropy",
        "images",
        "step",
        "time, h",
    ]
    rows = []
    for label, run_dir in run_dirs.items():
        found = _figures(run_dir)
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
    made = {
        label: f"{found['device']}, jax {found['versions']['jax']}, pkkd_jax"
        f" {found['versions']['pkkd_jax']}"
        if "device" in (found := _figures(run_dir))
        else "not finished"
        for label, run_dir in run_dirs.items()
    }
    notes = "; ".join(f"{label}: {text}" for label, text in made.items())
    return _table(head, rows) + f"<p>{html.escape(notes)}.</p>"


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
    counted = cost.twins(runs.network_arguments(run.config, "student"), image_shape)
    head, *rows = cost.totals(counted)
    notes = " ".join(cost.notes(counted))
    return _table(head, rows) + f"<p>{html.escape(notes)}</p>"


def _similarities(stages: dict) -> dict[str, dict[str, float]]:
    """Stage -> tap -> linear CKA of student and teacher."""
    return {
        stage: {
            tap: analysis.linear_cka(response, sides["teacher"][tap])
            for tap, response in sides["student"].items()
        }
        for stage, sides in stages.items()
        if "teacher" in sides
    }


def _along(run_dir: Path, images: np.ndarray, trust: bool):
    """CKA of all convolutions' responses, student against teacher, at some of the checkpoints."""
    steps = analysis.saved_steps(run_dir)
    chosen = [
        steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, CHECKPOINTS).round().astype(int))
    ]
    matrices = {}
    for step in chosen:
        networks = analysis.load(run_dir, step, trust).networks
        features = {}
        for which, network in networks.items():
            found = network.outputs(images).features
            features[which] = {tap: found[tap] for tap in select_taps(found, "all")}
        matrices[f"step {step:,}"] = analysis.cka(features["student"], features["teacher"])
    return plots.cka_heatmaps(matrices, list(features["student"]), list(features["teacher"]))


def _pictures(label: str, run_dir: Path, run: analysis.Run, stages, images, labels, trust) -> str:
    parts = [f"<h3>{html.escape(label)}, step {run.step:,}</h3>"]
    weights = {which: analysis.filters(network) for which, network in run.networks.items()}
    parts.append(
        _picture(
            plots.filter_histograms(weights),
            "Filters with maximum-likelihood fits of Gauss and Laplace, and Vuong's z: positive"
            " where the Laplacian is nearer.",
        )
    )
    taps = list(stages["raw"]["student"])
    tap = taps[len(taps) // 2]
    parts.append(_picture(plots.response_histograms(stages, tap), "Responses, stage by stage."))
    history = analysis.sigma_history(run_dir)
    if history:
        parts.append(_picture(plots.sigmas(history), "Bandwidths of the kernels in training."))
    if "teacher" in run.networks:
        parts.append(
            _picture(
                _along(run_dir, images, trust),
                "Linear CKA of raw responses, every convolution of the student against every one of"
                " the teacher.",
            )
        )
    features = {which: net.outputs(images).features for which, net in run.networks.items()}
    points = {
        which: analysis.embedding(found["penultimate"], "tsne")
        for which, found in features.items()
        if "penultimate" in found
    }
    if points:
        scatter = plots.class_scatter(points, labels)
        parts.append(_picture(scatter, "The classifier's input in two dimensions, by t-SNE."))
    adders = [layer for layer in weights["student"] if layer != "stem"]
    first = plots.filter_images(weights["student"][adders[0]], adders[0])
    parts.append(_picture(first, "The student's first filters behind the stem."))
    return "\n".join(parts)


def write(
    run_dirs: list[str], out: str | Path, images: int = 256, data_dir: str = "", trust: bool = False
) -> Path:
    """Writes the page.

    Args:
      run_dirs: directories that trainings wrote, finished or not.
      out: the file.
      images: number of unseen images whose responses are looked at.
      data_dir: where the data sets' files are; the runs' own places if "".
      trust: whether what the runs name from outside the package is imported.
    Returns:
      The path of the page.
    Raises:
      UserError: if there is no such run, or its data set is not there.
    """
    labelled = _labels(run_dirs)
    if not Path(out).parent.is_dir():  # before minutes are spent
        raise names.UserError(f"--out={out}: its directory is not there; make it or choose another")
    loaded = {label: analysis.load(run_dir, trust=trust) for label, run_dir in labelled.items()}
    pictures, similarity, numbers, zeros, costs = [], {}, [], {}, []
    for label, run in loaded.items():
        judge = "validation" if run.config["data"].get("validation") else "test"
        seen, labels = analysis.examples(run, images, judge, data_dir, trust)
        stages = analysis.responses(run, seen)
        prefix = f"{label}, " if len(loaded) > 1 else ""
        found = _similarities(stages)
        similarity |= {f"{prefix}{stage}": line for stage, line in found.items()}
        for which, network in run.networks.items():
            zeros[f"{prefix}{which}"] = shares = analysis.zero_shares(network, seen)
            filters = analysis.filters(network)
            fits = [analysis.fit(each).better for layer, each in filters.items() if layer != "stem"]
            numbers.append(
                [label, which, *(fits.count(kind) for kind in ("laplace", "gauss", "neither")),
                 f"{np.mean(list(shares.values())[1:]):.1%}",
                 *(f"{np.mean(list(found[s].values())):.3f}" if s in found and which == "student"
                   else "" for s in ("raw", "kernel", "rho"))]
            )  # fmt: skip
        costs.append(f"<h3>{html.escape(label)}</h3>" + _cost(run, seen.shape[1:]))
        pictures.append(_pictures(label, labelled[label], run, stages, seen, labels, trust))
    head = ["", "network", "layers nearer Laplace", "nearer Gauss", "neither", "zeros",
            "CKA with the teacher, raw", "after the kernel", "after rho"]  # fmt: skip
    title = "pkkd_jax: " + ", ".join(loaded)
    together = [_table(head, numbers)]
    if similarity:
        lines = plots.by_layer(similarity, "linear CKA", (0, 1))
        together.append(_picture(lines, "Similarity of student and teacher, tap by tap."))
    lines = plots.by_layer(zeros, "exactly zero (fraction)", (0, 1))
    together.append(_picture(lines, "Share of exactly zero features that each layer is given."))
    sections = {
        "Results": _results(labelled),
        "Curves": _picture(
            plots.learning_curves(
                labelled if len(labelled) > 1 else {"": next(iter(labelled.values()))}
            ),
            "Cross-entropy and accuracy in training.",
        ),
        "Cost of one image": "\n".join(costs),
        f"Features and filters, {images} unseen images": "\n".join(together),
        "Kernel space": "\n".join(pictures),
        "Configuration": _configurations(labelled),
    }
    body = "\n".join(f"<h2>{html.escape(name)}</h2>\n{part}" for name, part in sections.items())
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )
    Path(out).write_text(page)
    return Path(out)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    logging.set_verbosity(logging.FATAL)
    parser = argparse.ArgumentParser("python -m pkkd_jax.report", allow_abbrev=False)
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR")
    parser.add_argument("--out", default="", help="default: report.html in the first run directory")
    parser.add_argument("--images", type=int, default=256, help="unseen images to look at")
    parser.add_argument("--data_dir", default="", help="where the data sets' files are")
    parser.add_argument("--trust", action="store_true", help="import what runs name from outside")
    given = parser.parse_args(argv)
    out = given.out or Path(given.run_dirs[0]) / "report.html"
    try:
        path = write(given.run_dirs, out, given.images, given.data_dir, given.trust)
    except names.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"error: {error.strerror}: {str(error.filename)!r}; choose another --out",
            file=sys.stderr,
        )
        return 2
    print(f"{path}, {path.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
