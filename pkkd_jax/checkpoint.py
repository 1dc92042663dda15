"""Checkpoints: Orbax behind a thin wrapper, and networks loaded from any run directory."""

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization, traverse_util
from orbax.checkpoint.checkpoint_managers import preservation_policy

from pkkd_jax import models
from pkkd_jax.names import UserError
from pkkd_jax.state import DistillState

PARTS = ("student", "teacher", "distiller")
KEEP_LATEST = 2
SPARE_BYTES = 2**20  # for a checkpoint's metadata


def _flatten(tree) -> dict[str, np.ndarray]:
    """A tree as `{"params/stem/kernel": array}`, in copies that no donated buffer can reach."""
    flat = traverse_util.flatten_dict(serialization.to_state_dict(tree), sep="/")
    return {key: np.array(value) for key, value in flat.items()}


class Checkpoints:
    """The checkpoints of one run: the latest two, and the one of the best accuracy unseen."""

    def __init__(self, run_dir: Path):
        policies = preservation_policy
        keep = policies.AnyPreservationPolicy(
            [
                policies.LatestN(KEEP_LATEST),
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics["accuracy"],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            best_fn=lambda metrics: metrics["accuracy"],
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager(
            (Path(run_dir) / "checkpoints").absolute(), options=options, item_names=PARTS
        )

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step of the best test accuracy, None if none was measured."""
        return self._manager.best_step()

    def save(self, state: DistillState, accuracy: float | None = None) -> None:
        """Saves `state`; `accuracy` is the student's on the test split, if it was measured.

        Raises:
          FloatingPointError: if a parameter is not finite; nothing is written then.
          OSError: if there is no space, for this one or for the one before.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        parts = {name: _flatten(getattr(state, name)) for name in PARTS if getattr(state, name)}
        for name, part in parts.items():
            for key, value in part.items():
                if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
                    raise FloatingPointError(f"{name}'s {key} is not finite at step {step}")
        self.wait()
        size = sum(value.nbytes for part in parts.values() for value in part.values())
        if shutil.disk_usage(self._manager.directory).free < size + SPARE_BYTES:
            # Found out while writing, it would leave a broken checkpoint.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        items = {name: ocp.args.StandardSave(part) for name, part in parts.items() if part}
        metrics = None if accuracy is None else {"accuracy": accuracy}
        with _disk_errors():
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def restore(self, step: int, template: DistillState) -> DistillState:
        """The state at `step`, in the structure of `template`, as NumPy arrays."""
        restored = {}
        for name in PARTS:
            part = getattr(template, name)
            if part is not None:
                restored[name] = _fill(part, self.read(step, name) if _flatten(part) else {}, name)
        return template.replace(step=np.int32(step), **restored)

    def read(self, step: int, name: str) -> dict[str, np.ndarray]:
        """One part of the checkpoint at `step`, flat."""
        arguments = ocp.args.Composite(**{name: ocp.args.StandardRestore()})
        return dict(self._manager.restore(step, args=arguments)[name])

    def wait(self) -> None:
        """Waits until what was saved is on disk.

        Raises:
          OSError: if there is no space for it.
        """
        with _disk_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits likewise, and frees the threads."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # what the wait has raised already
                self._manager.close()


@contextlib.contextmanager
def _disk_errors():
    """Makes an OSError of what the library below Orbax says of a full disk in a ValueError."""
    try:
        yield
    except ValueError as error:
        if "No space left" not in str(error) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


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


def read_config(run_dir: str | Path) -> dict:
    """The configuration that a run directory was made with.

    Raises:
      UserError: if `run_dir` holds no run.
    """
    path = Path(run_dir) / "config.json"
    if not path.is_file():
        raise UserError(
            f"run directory {str(run_dir)!r} holds no config.json: expected a directory that"
            " `python -m pkkd_jax.main --workdir=DIR` wrote"
        )
    try:
        config = json.loads(path.read_text())
        needed = {"student", "teacher", "data", "num_classes"}
        if not isinstance(config, dict) or needed - set(config):
            raise ValueError("not the configuration of a training")
        return config
    except ValueError as error:
        raise UserError(
            f"{str(path)!r} cannot be used ({error}): restore it, or choose another directory"
        ) from error


def network_arguments(config: dict, which: str) -> dict | None:
    """Keywords of `models.build` for the student or teacher of a run's `config`; None if none."""
    if which == "teacher" and config["teacher"]["mode"] == "none":
        return None
    if which == "teacher" and config["teacher"]["mode"] == "snapshot":
        which = "student"
    own = {k: v for k, v in config[which].items() if k not in ("mode", "run_dir", "which")}
    if config["dtype"] != "float32":  # a model of the user's own need not have the field
        own["dtype"] = config["dtype"]
    return {**own, "num_classes": config["num_classes"]}


def load_network(run_dir: str | Path, which: str = "student", step: str | int = "last", model=None):
    """Loads one trained network from a run directory; the data set is not needed.

    Args:
      run_dir: a directory that a training wrote.
      which: "student" or "teacher".
      step: "last", "best" (by test accuracy of the student) or a saved step.
      model: the Linen module; built from the run's configuration if None, which is refused for
        modules from outside the package: a run directory does not choose what is imported.
    Returns:
      `(model, variables)`: `model.apply(variables, images, train=False)` gives `Outputs` for images
      that are normalised as in training, by `data.normalise` with the source's mean and std.
      BatchNorm has the running statistics of the training, those of the `_uncalibrated` figures.
    Raises:
      UserError: if there is no such run, network or step; the message says what there is.
    """
    if which not in ("student", "teacher"):
        raise UserError(f"{which=}: expected 'student' or 'teacher'")
    config = read_config(run_dir)
    description = network_arguments(config, which)
    if description is None:
        raise UserError(f"the run in {str(run_dir)!r} has no {which}: it was trained without one")
    if model is None:
        outside = [v for v in (description["name"], description.get("conv", "")) if "." in v]
        if outside:
            raise UserError(
                f"the {which} of {str(run_dir)!r} is {outside[0]!r}, from outside the package: pass"
                " it as load_network(..., model=...); at the command line, --trust imports it"
            )
        model = models.build(**description)
    with _saved(run_dir, step) as (checkpoints, chosen):
        flat = checkpoints.read(chosen, which)
    variables = {"params": {}, "batch_stats": {}}
    nested = traverse_util.unflatten_dict(flat, sep="/")
    variables.update({key: nested[key] for key in variables if key in nested})
    return model, jax.tree.map(np.asarray, variables)


def load_state(run_dir: str | Path, template: DistillState, step: str | int = "last"):
    """The whole state of a training, in the structure of `template`, as NumPy arrays.

    Args:
      run_dir: a directory that a training wrote.
      template: a state of the same configuration, as `update.init_state` makes it.
      step: "last", "best" (by test accuracy of the student) or a saved step.
    Raises:
      UserError: if there is no such step, or it is of another architecture.
    """
    with _saved(run_dir, step) as (checkpoints, chosen):
        return checkpoints.restore(chosen, template)


@contextlib.contextmanager
def _saved(run_dir: str | Path, step: str | int):
    """Yields the checkpoints of a run, and which of its steps `step` is."""
    if not (Path(run_dir) / "checkpoints").is_dir():
        raise UserError(f"the run in {str(run_dir)!r} has no checkpoint yet")
    checkpoints = Checkpoints(Path(run_dir))
    try:
        steps = checkpoints.steps()
        if not steps:
            raise UserError(f"the run in {str(run_dir)!r} has no checkpoint yet")
        chosen = {"last": steps[-1], "best": checkpoints.best_step() or steps[-1]}.get(step, step)
        if chosen not in steps:
            raise UserError(
                f"{step=} of {str(run_dir)!r}: expected 'last', 'best' or one of {steps}"
            )
        yield checkpoints, chosen
    finally:
        checkpoints.close()
