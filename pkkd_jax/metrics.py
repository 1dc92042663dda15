"""Where figures go: `metrics.jsonl` and TensorBoard events in the run directory."""

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

logging.getLogger("tensorboardX").setLevel(logging.ERROR)


class Writer:
    """Appends one row a call to `metrics.jsonl`, and the same figures to TensorBoard.

    A run that resumes at step `resume_step` forgets the rows after it: they will come again.

    Attributes:
      last: the last row that was kept, `{}` in a new run.
    """

    def __init__(self, run_dir: Path, resume_step: int):
        from tensorboardX import SummaryWriter

        path = run_dir / "metrics.jsonl"
        kept = [row for row in read(run_dir) if row["step"] <= resume_step]
        self.last = kept[-1] if kept else {}
        _replace(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a")
        self._events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, row: dict[str, float]) -> None:
        """Writes `row` under `step`; names are paths, `test/student/accuracy`."""
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        for name, value in row.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes both."""
        self._file.close()
        self._events.close()


def write_json(path: Path, tree: Any) -> None:
    """Writes `tree` to `path`, whole or not at all."""
    _replace(path, json.dumps(tree, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """What `write_json` wrote; None if it is not there, or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _replace(path: Path, text: str) -> None:
    replacement = path.with_suffix(".tmp")
    replacement.write_text(text)
    replacement.replace(path)


def read(run_dir: Path) -> list[dict[str, float]]:
    """Rows of a run's `metrics.jsonl`, oldest first; without damaged lines, as a kill leaves."""
    path = Path(run_dir) / "metrics.jsonl"
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows
