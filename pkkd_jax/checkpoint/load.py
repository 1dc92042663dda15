"""Networks and states out of any run, whatever wrote it."""

import contextlib
import warnings
from pathlib import Path

import jax
import numpy as np
from absl import logging
from flax import serialization, traverse_util

from pkkd_jax import models, runs
from pkkd_jax.checkpoint.store import PARTS, Checkpoints, Damaged, Flat
from pkkd_jax.names import UserError
from pkkd_jax.state import DistillState


def load_network(run_dir: str | Path, which: str = "student", step: str | int = "last", model=None):
    """Loads one trained network from a run directory; the data set is not needed.

    Args:
      run_dir: a directory that a training wrote.
      which: "student" or "teacher".
      step: "last", "best" (by the student's accuracy on unseen images) or a saved step.
      model: the Linen module; built from the run's configuration if None, which is refused for
        modules from outside the package: a run directory does not choose what is imported.
    Returns:
      `(model, variables)`: `model.apply(variables, images, train=False)` gives `Outputs` for images
      that are normalised as in training, by `data.normalise` with the source's mean and std.
      BatchNorm has the running statistics of the training, those of the `_uncalibrated` figures.
    Raises:
      UserError: if there is no such run, network or step; the message says what there is.
    """
    config = runs.read_config(run_dir)
    description = runs.network_arguments(config, which)
    if description is None:
        raise UserError(f"the run in {str(run_dir)!r} has no {which}: it was trained without one")
    if model is None:
        remedy = "pass it as load_network(..., model=...); at the command line, --trust imports it"
        runs.refuse_outside(run_dir, config, [which], remedy)
        model = models.build(**description)
    return model, variables(load_parts(run_dir, step)[1][which])


def variables(part: dict) -> dict:
    """What `model.apply` takes, of a network as `load_parts` returns it."""
    return {key: part.get(key, {}) for key in ("params", "batch_stats")}


def load_parts(run_dir: str | Path, step: str | int = "last") -> tuple[int, dict[str, dict]]:
    """All that a checkpoint holds, without the structure of its configuration.

    Args:
      run_dir: a directory that a training wrote.
      step: "last", "best" (by the student's accuracy on unseen images) or a saved step.
    Returns:
      The step, and "student", "teacher" and "distiller" to nested dicts of NumPy arrays, of which
      those under "params" are parameters and those under "batch_stats" BatchNorm's statistics.
    Raises:
      UserError: if there is no such run or step; the message says what there is.
    """
    found, parts = _saved(run_dir, step)
    nested = {name: traverse_util.unflatten_dict(flat, sep="/") for name, flat in parts.items()}
    return found, jax.tree.map(np.asarray, nested)


def saved_steps(run_dir: str | Path) -> list[int]:
    """The steps of a run that have a checkpoint, oldest first.

    Raises:
      UserError: if there is none.
    """
    with _readable(run_dir) as checkpoints:
        return checkpoints.steps()


def load_state(run_dir: str | Path, template: DistillState, step: str | int = "last"):
    """The whole state of a training, in the structure of `template`, as NumPy arrays.

    Args:
      run_dir: a directory that a training wrote.
      template: a state of the same configuration, as `update.init_state` makes it.
      step: "last", "best" (by the student's accuracy on unseen images) or a saved step.
    Raises:
      UserError: if there is no such step, or it is of another architecture.
    """
    return fill(template, *_saved(run_dir, step))


def fill(template: DistillState, step: int, parts: dict[str, Flat]) -> DistillState:
    """The state that `parts` of a checkpoint hold, in the structure of `template`.

    Raises:
      UserError: if they are of another architecture.
    """
    filled = {
        name: _fill(getattr(template, name), parts[name], name)
        for name in PARTS
        if getattr(template, name) is not None
    }
    return template.replace(step=np.int32(step), **filled)


def _fill(template, flat: dict[str, np.ndarray], name: str):
    state_dict = serialization.to_state_dict(template)
    wanted = traverse_util.flatten_dict(state_dict, sep="/", keep_empty_nodes=True)
    empty = traverse_util.empty_node
    differing = {key for key, value in wanted.items() if value is not empty} ^ set(flat)
    for key in set(flat) & set(wanted):
        if np.shape(wanted[key]) != np.shape(flat[key]):
            differing.add(key)
    if differing:
        raise UserError(
            f"the checkpoint's {name} is of another architecture: {sorted(differing)[0]} differs"
        )
    filled = {key: value if value is empty else flat[key] for key, value in wanted.items()}
    return serialization.from_state_dict(template, traverse_util.unflatten_dict(filled, sep="/"))


def _saved(run_dir: str | Path, step: str | int) -> tuple[int, dict[str, Flat]]:
    """The checkpoint that `step` means, or for "last" the newest that is intact."""
    with _readable(run_dir) as checkpoints:
        steps = checkpoints.steps()
        if isinstance(step, str) and step.isdigit():
            step = int(step)
        chosen = {"last": steps[-1], "best": checkpoints.best_step() or steps[-1]}.get(step, step)
        if chosen not in steps:
            raise UserError(
                f"{step=} of {str(run_dir)!r}: expected 'last', 'best' or one of {steps}"
            )
        for each in reversed(steps[: steps.index(chosen) + 1]):
            try:
                return each, checkpoints.read(each)
            except Damaged as error:
                text = f"the checkpoint of step {each} in {str(run_dir)!r} is damaged ({error})"
                if step != "last":
                    raise UserError(f"{text}: choose another of {steps}") from error
                warnings.warn(f"{text}; the one before is used", stacklevel=3)
        raise UserError(f"no checkpoint in {str(run_dir)!r} is intact: train again")


@contextlib.contextmanager
def _readable(run_dir: str | Path):
    """The checkpoints of a run that has some, to be read."""
    none = UserError(f"the run in {str(run_dir)!r} has no checkpoint yet")
    if not (Path(run_dir) / "checkpoints").is_dir():
        raise none
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # Orbax warns that what is read only is read only
    try:
        with contextlib.closing(Checkpoints(Path(run_dir), read_only=True)) as checkpoints:
            if not checkpoints.steps():
                raise none
            yield checkpoints
    finally:
        logging.set_verbosity(verbosity)
