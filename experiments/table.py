"""Runs a table: every row with every seed, and a Markdown table and a plot of what came out.

python -m experiments.table NAME [--seeds=3] [--epochs=30] [--data_dir=DIR] [--config.LEAF=VALUE]

Tables stand in tables.toml, what was published in published.toml. A cell is an ordinary run
directory, which tables share: a stopped table goes on, and what is finished is not run again.
"""

import argparse
import itertools
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

from experiments import report
from experiments.cells import Cells, collect, finished, slug
from pkkd_jax.names import UserError, unknown

HERE = Path(__file__).parent
DEFAULTS = {"columns": ["cifar10"], "config": "resnet20", "set": {}, "teacher": ""}
ROW = {"argument": "", "published_only": False, "kd": ""}


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
    path, failed = Path(given.out) / slug(f"{table['name']}-{cells.schedule}"), []

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
