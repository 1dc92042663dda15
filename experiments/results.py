"""RESULTS.md: the tables of claims.toml from their finished cells, and what they say of the claims.

python -m experiments.results [--out=experiments/results]

It trains nothing: each table stands with the command that runs it, or goes on with it. Where a cell
has checkpoints and its features were not looked at yet, they are, and features.json is written.
"""

import argparse
import itertools
import math
import shlex
import statistics
import sys
import textwrap
import tomllib
from pathlib import Path

from experiments import report, table
from experiments.cells import Cells, collect
from pkkd_jax import analysis, metrics
from pkkd_jax.names import UserError

HERE = Path(__file__).parent
IMAGES = 512  # of which similarity is taken: fewer make it larger
HEAD = """# Results

The claims of PKKD's paper (Xu et al., NeurIPS 2020) and of its authors' response to the reviews, as
far as runs of this project have come to them. Written by `python -m experiments.results` from the
cells in `{cells}/`, not by hand; each table has its command, which goes on from the cells that are
there (with `TFDS_DATA_DIR` set). The data are CIFAR-10 as JPEG copies (quality 75), on which
accuracies are a little lower than on the original, and schedules are short where the published ones
have 400 epochs. The paper's own figures are means of five runs.

ANN is the adder network, CNN its convolutional twin, KD distillation by logits, PKKD KD and the
loss on features after the kernel ("no kernel": on the features as they are). A teacher is
progressive, trained beside the student, or fixed, trained before; it is the CNN where nothing else
is said. The paper writes K and P for kernel and progressive, and NK and NP without. Beta is the
weight of PKKD's loss on features, 1 where nothing is said. Tables of one run a row have seed 0,
also where another table has more.

## Claims

A figure of accuracy is a difference in points, on the schedule above it. It is decided where
Welch's t-test of two runs or more on each side gives p < 0.05; without a verdict it has one run on
a side and only points somewhere: at 6 epochs the same seed differed by up to 1.5 points between two
machines. Two figures are the similarity of a student and its teacher, linear CKA of their raw
responses, first of the side that is said to have more; it is not tested. Filters are counted by
layer, over all runs, and what is said of them holds where it does for more than half. Time is that
of the fastest tenth of the steps, as other things ran beside most runs, on devices that both sides
have, and little more is up to 1.2 times. Blank: the claim is not looked at on this schedule.
"""


def features(run_dir: Path) -> dict | None:
    """What `features.json` holds, made from the checkpoint if need be; None without either.

    Returns:
      "filters": network -> how many of its layers behind the stem are nearer to "laplace", "gauss"
      or "neither"; "similarity", of a run with a teacher: linear CKA of both networks' raw
      responses, mean over the taps that PKKD compares.
    """
    path = run_dir / "features.json"
    if path.exists() or not (run_dir / "checkpoints").is_dir():
        return metrics.read_json(path)
    run, found = analysis.load(run_dir), {"filters": {}}
    for which, network in run.networks.items():
        nearer = [
            analysis.fit(filters).better
            for layer, filters in analysis.filters(network).items()
            if layer != "stem"
        ]
        found["filters"][which] = {
            key: nearer.count(key) for key in ("laplace", "gauss", "neither")
        }
    if "teacher" in run.networks:
        images, _ = analysis.examples(run, IMAGES)
        alike = analysis.similarities(analysis.responses(run, images))["raw"]
        found["similarity"] = statistics.mean(alike.values())
    metrics.write_json(path, found)
    return found


def compare(better: list[float], worse: list[float]) -> str:
    """The difference of two means, in points, and what it says of `better` > `worse`.

    It is decided by Welch's t-test at 0.05, for which each side needs two runs.
    """
    from scipy import stats

    if not better or not worse:
        return "not run"
    difference = statistics.mean(better) - statistics.mean(worse)
    text = f"{difference:+.2f}"
    if min(len(better), len(worse)) < 2:
        return text
    if difference == 0:
        return f"{text}: not decided"
    p = stats.ttest_ind(better, worse, equal_var=False).pvalue
    verdict = "holds" if difference > 0 else "does not hold"
    return f"{text}: {verdict if p < 0.05 else 'not decided'}, p = {p:.2g}"


def compare_filters(cells: list[dict]) -> list[tuple[str, str]]:
    """For each network of `cells`: its name, how many layers are nearer to what, and a verdict."""
    looked = [cell["features"]["filters"] for cell in cells if cell["features"]]
    lines = []
    for which, wanted in (("student", "laplace"), ("teacher", "gauss")):
        text = "no checkpoint" if cells else "not run"
        if looked:
            counts = {key: sum(each[which][key] for each in looked) for key in looked[0][which]}
            most = counts[wanted] > sum(counts.values()) / 2
            text = ", ".join(f"{count} {key}" for key, count in counts.items())
            text += f": {'holds' if most else 'does not hold'}"
        lines.append((f"{which}'s layers", text))
    return lines


def compare_similarity(better: list[dict], worse: list[dict]) -> str:
    """Both means of finished cells, the one of `better` first."""
    if not better or not worse:
        return "not run"
    looked = [[c["features"]["similarity"] for c in s if c["features"]] for s in (better, worse)]
    if not all(looked):
        return "no checkpoint"
    return " and ".join(f"{statistics.mean(values):.3f}" for values in looked)


def compare_time(better: list[dict], worse: list[dict], bound: float) -> str:
    """How many times longer `better` takes for an image, and whether `bound` is kept.

    It is the mean over the devices that both were made on.
    """
    if not better or not worse:
        return "not run"

    def times(cells):
        timed = [cell for cell in cells if not math.isnan(cell["epoch_s"])]
        devices = {cell["device"] for cell in timed}
        return {
            device: statistics.mean(each["epoch_s"] for each in timed if each["device"] == device)
            for device in devices
        }

    ours, theirs = times(better), times(worse)
    ratios = [ours[device] / theirs[device] for device in ours.keys() & theirs]
    if not ratios:
        return "made on different devices"
    ratio = statistics.mean(ratios)
    return f"{ratio:.2f} times: {'holds' if ratio <= bound else 'does not hold'}"


def check(claim: dict, cells: dict[str, list[dict]]) -> list[tuple[str, str]]:
    """What finished cells, by row, say of a claim: comparisons, each with figures and verdict."""
    quantity, better = claim.get("quantity", "accuracy"), cells[claim["better"]]
    if quantity == "filters":
        return compare_filters(better)
    lines = []
    for other in claim["worse"]:
        worse = cells[other]
        if quantity == "similarity":
            found = compare_similarity(better, worse)
        elif quantity == "time":
            found = compare_time(better, worse, claim["bound"])
        else:
            found = compare(*([cell[quantity] for cell in side] for side in (better, worse)))
        sign = "/" if quantity == "time" else ">"
        lines.append((f"{claim['better']} {sign} {other}", found))
    return lines


def tabulate(block: dict, out: Path, leaves: list[str]) -> tuple[str, dict[str, list[dict]]]:
    """A block's table with its command and its curves, as Markdown, and its finished cells by row.

    The picture of the curves is written into `out`.
    """
    epochs, seeds = block["epochs"], block["seeds"]
    content = table.load(block["table"])
    content["columns"] = content["columns"][:1]
    rows = block.get("rows", list(content["rows"]))
    content["rows"] = {row: content["rows"][row] for row in rows}
    words = ["python", "-m", "experiments.table", block["table"], f"--epochs={epochs}"]
    words += [f"--seeds={seeds}", *leaves, f"--columns={content['columns'][0]}"]
    words += [f"--rows={';'.join(rows)}"] if "rows" in block else []
    found = collect(content, Cells(out, leaves, epochs, ""), seeds)
    text = report.markdown(content, found, shlex.join([*words, f"--out={out}"]))
    text = f"#{text}".replace("\n", f", {epochs} epochs\n", 1)
    if any(found.values()):
        # Not the name that the table itself gives its picture, which may have more rows.
        picture = out / f"results-{block['table']}-{epochs}-epochs-curves.png"
        report.plot_curves(content, found, picture)
        text += f"\n![learning curves]({picture.relative_to(out.parent)})\n"
    return text, {row: cells for (row, _), cells in found.items()}


def write(out: Path) -> str:
    """Writes RESULTS.md beside `out`, the directory of all cells, and plots in it.

    Returns:
      The Markdown.
    Raises:
      UserError: if there is no such directory, or no finished cell in it.
    """
    if not out.is_dir():
        raise UserError(f"--out={str(out)!r} is no directory: name that of a table's cells")
    known = tomllib.loads((HERE / "claims.toml").read_text())
    leaves = [f"--config.batch_size={known['batch_size']}"]
    tables, hours = [], {}
    verdicts: dict[tuple, dict[int, str]] = {}  # by table, claim and comparison, then epochs
    for block in known["blocks"]:
        text, cells = tabulate(block, out, leaves)
        tables.append(text)
        hours |= {each["run_dir"]: each["wall_s"] / 3600 for row in cells.values() for each in row}
        claims = [claim for claim in known["claims"] if claim["table"] == block["table"]]
        looked = {
            row
            for claim in claims
            if claim.get("quantity") in ("filters", "similarity")
            for row in (claim["better"], *claim.get("worse", []))
        }
        for cell in itertools.chain.from_iterable(cells[row] for row in looked):
            cell["features"] = features(cell["run_dir"])
        for claim in claims:
            for comparison, figures in check(claim, cells):
                line = verdicts.setdefault((block["table"], claim["text"], comparison), {})
                line[block["epochs"]] = figures
    if not hours:
        raise UserError(f"--out={str(out)!r} holds no finished cell: name that of a table's cells")
    schedules = sorted({block["epochs"] for block in known["blocks"]})
    rows = [["claim", "", *(f"{epochs} epochs" for epochs in schedules)]]
    rows.append(["---"] * len(rows[0]))
    for claim, lines in itertools.groupby(verdicts.items(), lambda line: line[0][:2]):
        named = claim[1]
        for (*_, comparison), by_epochs in lines:
            rows.append([named, comparison, *(by_epochs.get(each, "") for each in schedules)])
            named = ""  # once
    lines = [f"| {' | '.join(row)} |" for row in rows]
    total = f"{len(hours)} runs, {sum(hours.values()):.1f} hours."
    why = [f"**{c['text']}.** {c['why']}" for c in known["claims"] if "why" in c]
    why = [textwrap.fill(each, 100, break_on_hyphens=False) + "\n" for each in why]
    text = "\n".join([HEAD.format(cells=out.name), *lines, "", total, "", *why, *tables])
    (out.parent / "RESULTS.md").write_text(text)
    return text


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser("python -m experiments.results", allow_abbrev=False)
    parser.add_argument(
        "--out", default="experiments/results", type=Path, help="directory of all cells"
    )
    given = parser.parse_args(argv)
    try:
        print(f"{write(given.out)}\nin {given.out.parent / 'RESULTS.md'}")
        return 0
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
