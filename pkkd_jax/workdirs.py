"""Whether a training may work in a directory: it is this run's own, and no other works there."""

import contextlib
import copy
import os
from pathlib import Path

import numpy as np
from flax import traverse_util

from pkkd_jax import checkpoint, runs
from pkkd_jax import config as config_lib
from pkkd_jax.names import UserError

# Leaves in which processes that train together may differ: they do no step of the work.
OWN = (("data", "data_dir"), ("teacher", "run_dir"), ("workers",), ("compilation_cache_dir",))
# Leaves that say where, how fast and how often, and change no result: a run may go on with others.
PLACES = (
    *OWN,
    ("log_every_steps",),
    ("checkpoint_every_s",),
    ("keep_evaluated",),
    ("eval", "pictures"),
    ("watchdog_s",),
    ("skip_not_finite",),
    ("max_damaged",),
)


def require_same_run(workdir: Path, config: dict) -> None:
    """Makes the directory, and refuses one that holds a run with another configuration.

    Args:
      workdir: the directory.
      config: of an `experiment.Experiment`.
    Raises:
      UserError: likewise, or if it holds other files or cannot be written.
    """
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        others = [p for p in workdir.iterdir() if p.name != "checkpoints" or any(p.iterdir())]
        if others and not path.exists():
            raise UserError(
                f"workdir {str(workdir)!r} holds other files and no run:"
                " choose an empty or new directory with --workdir"
            )
        if not path.exists():
            return
    except OSError as error:
        raise UserError(
            f"workdir {str(workdir)!r} cannot be written: {error.strerror};"
            " choose another with --workdir"
        ) from error
    theirs, ours = (_essence(each) for each in (runs.read_config(workdir), config))
    means = [each.get("examples", {}).pop("pixel_mean", 0.0) for each in (theirs, ours)]
    differing = config_lib.differences(theirs, ours)
    if abs(means[0] - means[1]) > 0.5:
        differing.append(f"images whose pixels have a mean of {means[0]} there, {means[1]} here")
    if differing:
        raise UserError(
            f"workdir {str(workdir)!r} holds a run with another config ({'; '.join(differing)}):"
            " choose another --workdir, or set these leaves back"
        )


def require_same_teacher(
    workdir: Path, theirs: checkpoint.Flat, run_dir: str, variables: dict
) -> None:
    """Refuses to go on beside another fixed teacher than a checkpoint in `workdir` holds.

    Args:
      workdir: for the message.
      theirs: the teacher of the checkpoint.
      run_dir: where `variables` are from, for the message.
      variables: of the teacher that was asked for.
    """
    ours = traverse_util.flatten_dict(variables, sep="/")
    if not all(key in theirs and np.array_equal(theirs[key], ours[key]) for key in ours):
        raise UserError(
            f"workdir {str(workdir)!r} holds a run beside another teacher than that of"
            f" config.teacher.run_dir={run_dir!r}: choose another --workdir, or name that teacher"
        )


@contextlib.contextmanager
def alone(workdir: Path):
    """Refuses a directory in which another training runs, which each would spoil for the other."""
    try:
        import fcntl
    except ImportError:  # on Windows
        yield
        return
    place = os.open(workdir, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # of a file system without locks
            try:
                fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"workdir {str(workdir)!r}: a training is running there; wait for it, or choose"
                    " another --workdir"
                ) from error
        yield
    finally:
        os.close(place)


def without(config: dict, leaves: tuple) -> dict:
    """A copy of `config` that lacks `leaves`, each a path of keys."""
    config = copy.deepcopy(config)
    for *parents, leaf in leaves:
        place = config
        for key in parents:
            place = place.get(key, {})
        place.pop(leaf, None)
    return config


def _essence(config: dict) -> dict:
    """What of a configuration a run's results depend on."""
    config = without(config, PLACES)
    if config["teacher"]["mode"] == "none":
        # Without a teacher it is the same run whatever the losses' leaves say.
        config["teacher"], config["distill"] = {"mode": "none"}, {}
    return config
