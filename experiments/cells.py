"""Cells of a table: where they are, the commands that make them, what finished ones show."""

import itertools
import re
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from pkkd_jax import config as config_lib
from pkkd_jax import main as training
from pkkd_jax import metrics, runs, workdirs

CONFIGS = Path(__file__).parent.parent / "configs"
LONGEST = 255  # bytes that a directory's name may have


def slug(text: str) -> str:
    """`text` as a part of a file's name."""
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
        return slug("-".join(leaf.removeprefix("--config.") for leaf in self.leaves))

    def directory(self, table: dict, row: dict, column: str, seed: int) -> Path:
        """The run directory of one cell; what is set for it is in its name."""
        parts = [row["config"], row["argument"]]
        parts += [f"{leaf}={value}" for leaf, value in sorted(row["set"].items())]
        if row["teacher"]:
            teacher = self.directory(table, table["rows"][row["teacher"]], column, seed)
            parts.append(f"from-{teacher.parent.name}")
        name = slug("-".join(filter(None, parts)))
        if len(name) > LONGEST:
            name = f"{name[: LONGEST - 9]}-{zlib.crc32(name.encode()):08x}"
        return self.out / slug(f"{column}-{self.schedule}") / name / f"seed{seed}"

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
            f"--config={CONFIGS / row['config']}.py:{argument}",
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
        "training": curve[-1][-1],
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
    if not metrics.read_json(run_dir / "results.json"):
        return False
    wanted = config_lib.to_json(cells.config(table, row, column, seed))
    theirs = runs.read_config(run_dir)
    of_data = {key: theirs[key] for key in ("num_classes", "examples") if key in theirs}
    workdirs.require_same_run(run_dir, wanted | of_data)
    return True
