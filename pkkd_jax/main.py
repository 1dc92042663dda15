"""Trains what a configuration describes.

python -m pkkd_jax.main --config=configs/NAME.py[:ARG] --workdir=DIR --config.any.leaf=value
"""

import os
import shutil
import sys
import traceback
import warnings
from logging import CRITICAL, getLogger
from pathlib import Path

# Before JAX starts: its CPU client's notices are not for users.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import flags, logging
from ml_collections import ConfigDict

from pkkd_jax import analysis, checkpoint, command, distributed, memory, names, stopping, train

USAGE = (
    "python -m pkkd_jax.main --config=configs/quickstart.py [--workdir=DIR] [--config.LEAF=VALUE]"
)


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "Run directory.", flag_values=values)
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0.", flag_values=values)
    flags.DEFINE_integer("process_count", None, "Processes that train.", flag_values=values)
    flags.DEFINE_integer("process_index", None, "Of this process.", flag_values=values)


def parse(argv: list[str]) -> tuple[ConfigDict, Path, tuple]:
    """The configuration, run directory and arguments of `distributed.initialize` in `argv`."""
    config, given, name = command.parse(argv, _define, USAGE, __doc__)
    processes = given.coordinator, given.process_count, given.process_index
    return config, Path(given.workdir or Path("runs") / name), processes


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _print_start(summary: dict) -> None:
    width = max(map(len, summary))
    for key, value in summary.items():
        print(f"{key:<{width}}  {value}", flush=True)


def _progress(figures: dict) -> list[str]:
    """What the latest figures say: the whole, then each network."""
    parts = [f"step {figures['step']}/{figures['total_steps']}"]
    if "images_per_s" in figures:
        parts[0] += f", {figures['images_per_s']:,.0f} img/s, {_duration(figures['left_s'])} left"
    for network in ("student", "teacher"):
        if f"train/{network}/loss" in figures:
            text = f"{network} loss {figures[f'train/{network}/loss']:.3f}"
            text += f" acc {figures[f'train/{network}/accuracy']:.1%}"
            for split in ("test", "validation"):
                if f"{split}/{network}/accuracy" in figures:
                    text += f" {split} {figures[f'{split}/{network}/accuracy']:.1%}"
            parts.append(text)
    return parts


def _show_progress(figures: dict, shown: list[str]) -> None:
    """Prints a line; in a terminal a line for each part, in the place of those in `shown`."""
    parts = _progress(figures)
    if not sys.stdout.isatty():
        print(" | ".join(parts), flush=True)
        return
    columns = shutil.get_terminal_size().columns
    up = f"\x1b[{len(shown)}A" if shown else ""
    print(up + "\n".join(f"\x1b[K{part[:columns]}" for part in parts), flush=True)
    shown[:] = parts


def _print_results(run_dir: Path, results: dict) -> None:
    rows = [("", "accuracy", "top-5", "loss", "uncalibrated accuracy")]
    split = "test" if "test/student/accuracy" in results else "validation"
    for network in ("teacher", "student"):
        if f"{split}/{network}/accuracy" in results:
            get = lambda what, network=network: results[f"{split}/{network}/{what}"]  # noqa: E731
            rows.append(
                (
                    network,
                    f"{get('accuracy'):.2%}",
                    f"{get('top5'):.2%}",
                    f"{get('loss'):.4f}",
                    f"{get('accuracy_uncalibrated'):.2%}",
                )
            )
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    duration = _duration(results["wall_s"])
    print(f"\n{split.capitalize()} results after {results['steps']:,} steps ({duration}):")
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
        ]
        print("  ".join(cells).rstrip())
    print(f"Results, curves and checkpoints are in {run_dir}")


def _print_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def _print_unraisable(unraisable) -> None:
    # Said by threads below Orbax whose save or restore has failed, which is raised besides.
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    argv = sys.argv if argv is None else argv
    # What libraries log as errors, they also raise.
    logging.set_verbosity(logging.FATAL)
    getLogger("asyncio").setLevel(CRITICAL)
    warnings.showwarning, sys.unraisablehook = _print_warning, _print_unraisable
    workdir, shown, agreed = None, [], False

    def at_interval(figures):
        _show_progress(figures, shown)
        if "images_per_s" not in figures:  # after the first step or an evaluation
            memory.trim()

    def at_picture(built, state):
        try:
            examples = analysis.normalised(built.splits.test, 0, built.splits.damage)
            analysis.write_events(workdir, analysis.of_state(built, state), *examples)
        except Exception as error:  # with a network of the user's own; the training goes on
            text = " ".join(str(error).split())[:200]
            warnings.warn(f"no pictures: {type(error).__name__}: {text}", stacklevel=2)

    def at_end(run_dir, results):
        analysis.plots.learning_curves({"": run_dir}).savefig(run_dir / "curves.png", dpi=120)
        _print_results(run_dir, results)

    def at_signal(name):
        print(f"{name}: saving after this step; again to stop at once", file=sys.stderr, flush=True)
        shown.clear()  # the next progress goes below

    try:
        config, workdir, processes = parse(argv)
        memory.keep()
        distributed.initialize(*processes)
        train.train_and_evaluate(
            config, workdir, _print_start, at_interval, at_end, at_signal, at_picture
        )
        return 0
    except stopping.Interrupted as stop:
        message, status = f"{stop}; the same command goes on from there", 128 + stop.signum
        agreed = True
    except KeyboardInterrupt:
        message, status = "stopped; the same command goes on from the last checkpoint", 130
    except names.UserError as error:
        message, status = f"error: {error}", 2
    except Exception as error:
        if isinstance(error, OSError) and error.errno in checkpoint.DISK_ERRORS:
            where = Path(error.filename or workdir)
            remedy = "free space or choose another --workdir"
            if not where.absolute().is_relative_to(workdir.absolute()):
                remedy = "make it readable, or name another"
            message, status = f"error: {error.strerror}: {str(where)!r}; {remedy}", 2
        elif distributed.several() and distributed.is_loss(error):
            text = " ".join(str(error).split())[:200]
            message = f"another process is lost ({text}); start all of them again to go on"
            status = distributed.LOST
        elif distributed.several():
            message, status = traceback.format_exc(), 1
        else:
            raise
    print(message, file=sys.stderr, flush=True)
    if distributed.several() and not agreed:
        distributed.leave_at_once(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
