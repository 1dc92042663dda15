"""Runs a table: every row with every seed, and a Markdown table and a plot of what came out.

python -m experiments.table NAME [--seeds=3] [--epochs=30] [--data_dir=DIR] [--config.LEAF=VALUE]

Tables stand in tables.toml, what was published in published.toml. A cell is an ordinary run
directory, which tables share: a stopped table goes on, and what is finished is not run again.
"""

import argparse
import itertools
import re
import shlex
import signal
import subprocess
import sys
import tomllib
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from experiments import report
from pkkd_jax import config as config_lib
from pkkd_jax import main as training
from pkkd_jax import metrics, runs, workdirs
from pkkd_jax.names import UserError, unknown

HERE = Path(__file__).parent
DEFAULTS = {"columns": ["cifar10"], "config": "resnet20", "set": {}, "teacher": ""}
ROW = {"argument": "", "published_only": False, "kd": ""}
LONGEST = 255  # bytes that a directory's name may have


def load(name: str) -> dict:
    """The table `name`: title, columns and rows, each row complete.

    Raises:
      UserError: for an unknown table, or a row whose teacher is no row above it.
    """
    tables = tomllib.loads((HERE / "tables.toml").read_text())
    if name not in tables:
        raise unknown("table", name, tables)
    table = {**DEFAULTS, **tables[name]}
    shared = {key: table[key] for key in ("config", "set", "teacher")}
    rows: dict[str, dict] = {}
    for row in table["rows"]:
        found = {**ROW, **shared, **row, "set": {**shared["set"], **row.get("set", {})}}
        if row["name"] == table["teacher"]:
            found["teacher"] = row.get("teacher", "")
        if found["teacher"] and found["teacher"] not in rows:
            raise unknown(f"teacher of row {row['name']!r},", found["teacher"], rows)
        rows[row["name"]] = found
    return {"name": name, "title": table["title"], "columns": table["columns"], "rows": rows}


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


class Cells:
    """Where the cells of a table are, and the commands that make them.

    Attributes:
      out: directory of all cells.
      leaves: arguments `--config.LEAF=VALUE` for every cell.
      epochs: 0 for those of the configuration.
      data_dir: of prepared data sets; "" for the usual place.
    """

    def __init__(self, out: Path, leaves: list[str], epochs: int, data_dir: str):
        self.out, self.data_dir = out, data_dir
        self.leaves = [*leaves, *([f"--config.epochs={epochs}"] if epochs else [])]

    @property
    def schedule(self) -> str:
        """What is set for every cell, as a part of a file's name."""
        return _slug("-".join(leaf.removeprefix("--config.") for leaf in self.leaves))

    def directory(self, table: dict, row: dict, column: str, seed: int) -> Path:
        """The run directory of one cell; what is set for it is in its name."""
        parts = [row["config"], row["argument"]]
        parts += [f"{leaf}={value}" for leaf, value in sorted(row["set"].items())]
        if row["teacher"]:
            teacher = self.directory(table, table["rows"][row["teacher"]], column, seed)
            parts.append(f"from-{teacher.parent.name}")
        name = _slug("-".join(filter(None, parts)))
        if len(name) > LONGEST:
            name = f"{name[: LONGEST - 9]}-{zlib.crc32(name.encode()):08x}"
        return self.out / _slug(f"{column}-{self.schedule}") / name / f"seed{seed}"

    def command(self, table: dict, row: dict, column: str, seed: int) -> list[str]:
        """The command that makes it."""
        argument = ",".join(filter(None, [f"data={column}", row["argument"]]))
        leaves = dict(row["set"])
        if row["teacher"]:
            teacher = self.directory(table, table["rows"][row["teacher"]], column, seed)
            leaves |= {
                "teacher.mode": "fixed",
                "teacher.run_dir": str(teacher),
                "teacher.which": "student",
            }
        if self.data_dir:
            leaves["data.data_dir"] = self.data_dir
        return [
            sys.executable,
            *("-m", "pkkd_jax.main"),
            f"--config={HERE.parent / 'configs' / row['config']}.py:{argument}",
            f"--workdir={self.directory(table, row, column, seed)}",
            f"--config.seed={seed}",
            *self.leaves,
            *(f"--config.{leaf}={value}" for leaf, value in leaves.items()),
        ]

    def config(self, table: dict, row: dict, column: str, seed: int) -> ConfigDict:
        """The configuration that this command trains.

        Raises:
          UserError: if it cannot be had.
        """
        return training.parse(self.command(table, row, column, seed)[2:])[0]


def read(run_dir: Path) -> dict | None:
    """What a finished cell shows; None if it is not finished."""
    results = metrics.read_json(run_dir / "results.json")
    if not results:
        return None
    config = runs.read_config(run_dir)
    judge = "validation" if config["data"]["validation"] else "test"
    rows = metrics.read(run_dir)
    rates = [row["train/images_per_s"] for row in rows if "train/images_per_s" in row]
    devices = sorted({start["device"] for start in results["starts"]})
    if len(devices) > 1:  # it has no one rate
        rates = []
    leaf = f"{judge}/student/accuracy"
    evaluated = {row["step"]: row for row in rows if leaf in row}
    keys = leaf, f"{leaf}_uncalibrated"
    curve = [
        (step, *(100 * row[key] for key in keys), 100 * seen)
        for (step, row), seen in zip(
            evaluated.items(), training_accuracy(rows, evaluated), strict=True
        )
    ]
    examples = config["examples"]["train"]
    return {
        "accuracy": 100 * results[leaf],
        "top5": 100 * results[f"{judge}/student/top5"],
        "uncalibrated": 100 * results[f"{leaf}_uncalibrated"],
        "teacher": 100 * results.get(f"{judge}/teacher/accuracy", float("nan")),
        "device": " and ".join(devices),
        "epoch_s": examples / np.quantile(rates, 0.9) if rates else float("nan"),
        "judge": judge,
        "curve": curve,
        **{key: results[key] for key in ("steps", "wall_s", "starts")},
        "batch_size": config["batch_size"],
        "run_dir": run_dir,
    }


def training_accuracy(rows: list[dict], steps: Iterable[int]) -> list[float]:
    """The student's accuracy on augmented training images before each of `steps`.

    It is the mean of the later half of the steps since the one before.
    """
    leaf = "train/student/accuracy"
    logged = [(0, 0.0)] + [(row["step"], row[leaf]) for row in rows if leaf in row]
    found, since = [], 0
    for step in steps:
        later = [
            (there - before, accuracy)
            for (before, _), (there, accuracy) in itertools.pairwise(logged)
            if (since + step) / 2 < there <= step
        ]
        found.append(sum(n * a for n, a in later) / sum(n for n, _ in later))
        since = step
    return found


def collect(table: dict, cells: Cells, seeds: int) -> dict[tuple[str, str], list[dict]]:
    """Finished cells by row and column; none of a row that is only published.

    What is to be run learns whether it adds KD: its "kd" becomes "yes" or "no".
    """
    found = {}
    for name, row in table["rows"].items():
        count = 0 if row["published_only"] else seeds
        if count:
            config = cells.config(table, row, table["columns"][0], 0)
            row["kd"] = "yes" if _adds_kd(config) else "no"
        for column in table["columns"]:
            each = [read(cells.directory(table, row, column, seed)) for seed in range(count)]
            found[name, column] = [cell for cell in each if cell]
    return found


def _adds_kd(config: ConfigDict) -> bool:
    kd = config.distill.get("kd")
    if config.teacher.mode == "none" or not kd:
        return False
    return kd.weight > 0 or (kd.weight_schedule != "constant" and kd.final_weight > 0)


def finished(cells: Cells, table: dict, row: dict, column: str, seed: int) -> bool:
    """Whether a cell is there, made with the configuration that it would be made with now.

    Raises:
      UserError: if it was made with another.
    """
    run_dir = cells.directory(table, row, column, seed)
    if not read(run_dir):
        return False
    wanted = config_lib.to_json(cells.config(table, row, column, seed))
    theirs = runs.read_config(run_dir)
    of_data = {key: theirs[key] for key in ("num_classes", "examples") if key in theirs}
    workdirs.require_same_run(run_dir, wanted | of_data)
    return True


def run(command: list[str]) -> int:
    """Runs one cell; a signal stops it when it has saved. Returns its exit status."""
    with subprocess.Popen(command) as process:
        # A terminal sends Ctrl-C to both, which the training obeys.
        previous = {
            signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
            signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
        }
        try:
            return process.wait()
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser("python -m experiments.table", allow_abbrev=False)
    parser.add_argument("name", help="of a table in experiments/tables.toml")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each row")
    parser.add_argument("--epochs", type=int, default=0, help="default: the configuration's")
    parser.add_argument("--data_dir", default="", help="of prepared data sets")
    parser.add_argument("--columns", default="", help="data sets, with commas between")
    parser.add_argument("--rows", default="", help="run some rows only, with semicolons between")
    parser.add_argument("--out", default="runs/tables", help="directory of all cells and tables")
    given, leaves = parser.parse_known_args(argv)
    words = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "-m", "experiments.table", *words])
    try:
        table = load(given.name)
        for leaf in leaves:
            if not leaf.startswith("--config.") or leaf.startswith("--config.seed"):
                raise UserError(
                    f"unexpected argument {leaf!r}: expected --config.LEAF=VALUE, and --seeds=N for"
                    " seeds 0 to N - 1"
                )
        if given.seeds < 1:
            raise UserError(f"--seeds={given.seeds}: it must be 1 or more")
        if given.columns:
            table["columns"] = given.columns.split(",")
        wanted = given.rows.split(";") if given.rows else list(table["rows"])
        for row in wanted:  # grows by the teachers of its rows
            if row not in table["rows"]:
                raise unknown(f"row of table {given.name!r},", row, table["rows"])
            teacher = table["rows"][row]["teacher"]
            if teacher and teacher not in wanted:
                wanted.append(teacher)
        return make(table, wanted, given, leaves, command)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def make(table: dict, wanted: list[str], given, leaves: list[str], command: str) -> int:
    """Runs the cells of the rows in `wanted` that are missing, and writes the table after each.

    Returns:
      The exit status: of a cell that a signal stopped; 2 if one failed, the others are run.
    """
    cells = Cells(Path(given.out), leaves, given.epochs, given.data_dir)
    path, failed = Path(given.out) / _slug(f"{table['name']}-{cells.schedule}"), []

    def write() -> str:
        return report.write(path, table, collect(table, cells, given.seeds), command)

    rows = {
        name: row
        for name, row in table["rows"].items()
        if name in wanted and not row["published_only"]
    }
    for column, row in itertools.product(table["columns"], rows.values()):
        cells.config(table, row, column, 0)  # a mistake, before any is run
    for seed in range(given.seeds):
        for column in table["columns"]:
            for name, row in rows.items():
                if finished(cells, table, row, column, seed):
                    continue
                print(f"\n{table['name']}: {name}, {column}, seed {seed}", flush=True)
                status = run(cells.command(table, row, column, seed))
                if -status in (signal.SIGINT, signal.SIGTERM):
                    status = 128 - status  # it came before the training obeys signals
                if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
                    print("stopped; the same command goes on from there", file=sys.stderr)
                    return status
                if status:
                    failed.append(f"{name}, {column}, seed {seed}")
                write()
    print(f"\n{write()}\nin {path}.md, {path}.png and {path}-curves.png")
    if failed:
        print(f"error: failed: {'; '.join(failed)}; see above", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
