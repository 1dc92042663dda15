"""The loop: data, step, log, evaluate, checkpoint."""

import contextlib
import copy
import json
import math
import signal
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from pkkd_jax import checkpoint, experiment, metrics
from pkkd_jax import config as config_lib
from pkkd_jax import update as update_lib
from pkkd_jax.names import UserError

# Leaves that say where, how fast and how often, and change no result: a run may go on with others.
PLACES = (
    ("data", "data_dir"),
    ("teacher", "run_dir"),
    ("workers",),
    ("log_every_steps",),
    ("checkpoint_every_steps",),
)


class Interrupted(Exception):
    """A signal asked the training to stop; it has been saved.

    Attributes:
      signum: the signal.
      step: the step that was saved.
    """

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signum).name} and saved at step {step}")
        self.signum, self.step = signum, step


def check_run(workdir: Path, config: dict) -> None:
    """Makes the directory, and refuses one that holds a run with another configuration."""
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
    there, here = checkpoint.read_config(workdir), copy.deepcopy(config)
    for tree in (there, here):
        for *parents, leaf in PLACES:
            place = tree
            for key in parents:
                place = place.get(key, {})
            place.pop(leaf, None)
        if tree["teacher"]["mode"] == "none":
            # Without a teacher it is the same run whatever the losses' leaves say.
            tree["teacher"], tree["distill"] = {"mode": "none"}, {}
    differing = config_lib.differences(there, here)
    if differing:
        raise UserError(
            f"workdir {str(workdir)!r} holds a run with another config ({'; '.join(differing)}):"
            " choose another --workdir, or set these leaves back"
        )


@contextlib.contextmanager
def _signals(at_signal: Callable[[str], None]):
    """Yields a list that receives the first SIGINT or SIGTERM; a second one acts at once."""
    received: list[int] = []
    previous = {}

    def handle(signum, frame):
        del frame
        received.append(signum)
        signal.signal(signum, previous[signum])
        at_signal(signal.Signals(signum).name)

    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM):
            previous[signum] = signal.signal(signum, handle)
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def evaluate_networks(
    networks: dict[str, Any],
    variables: dict[str, dict],
    splits: experiment.Splits,
    recalibrate_batches: int,
    mapped: dict,
    between: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Figures of networks on unseen images, with recalibrated and running BatchNorm statistics.

    Args:
      networks: name to model.
      variables: name to variables, on the devices; they stay as they are.
      splits: the data.
      recalibrate_batches: training batches for the statistics; 0 keeps the running ones.
      mapped: compiled functions by name, kept from call to call; `{}` at first.
      between: called before each batch; may raise to stop the evaluation.
    Returns:
      `<splits.judge>/<network>/{accuracy,top5,loss}`, and the same with `_uncalibrated`.
    """
    mean, std = splits.train.mean, splits.train.std
    for name, model in networks.items():
        if name not in mapped:
            mapped[name] = (
                update_lib.pmap(update_lib.evaluation(model, mean, std)),
                update_lib.pmap(update_lib.batch_statistics(model, splits.augmentation)),
            )

    def watched(batches):
        for batch in batches:
            between()
            yield batch

    calibrated = (
        update_lib.recalibrate(
            {name: (mapped[name][1], variables[name]) for name in networks},
            watched(splits.train_batches(0, recalibrate_batches)),
        )
        if recalibrate_batches
        else {}
    )
    evaluations = {
        **{f"{name}/uncalibrated": (mapped[name][0], variables[name]) for name in networks},
        **{name: (mapped[name][0], calibrated[name]) for name in calibrated},
    }
    found = update_lib.evaluate(evaluations, watched(splits.test_batches()))
    figures = {}
    for name in networks:
        raw = found[f"{name}/uncalibrated"]
        path = f"{splits.judge}/{name}"
        figures |= {f"{path}/{key}": value for key, value in found.get(name, raw).items()}
        figures |= {f"{path}/{key}_uncalibrated": value for key, value in raw.items()}
    return figures


def _finite(figures: dict[str, float]) -> bool:
    return all(math.isfinite(v) for k, v in figures.items() if k.endswith("/loss"))


def train_and_evaluate(
    config: ConfigDict,
    workdir: str | Path,
    at_start: Callable[[dict], None] = lambda summary: None,
    at_interval: Callable[[dict], None] = lambda figures: None,
    at_end: Callable[[Path, dict], None] = lambda run_dir, results: None,
    at_signal: Callable[[str], None] = lambda name: None,
) -> dict:
    """Trains what `config` describes in `workdir`, going on where an earlier call stopped.

    Args:
      config: a complete configuration, see `config.base`.
      workdir: the run directory; made if it is not there.
      at_start: called with texts that say what will be done.
      at_interval: called with the latest figures, `step`, `total_steps`, `images_per_s` and
        `left_s`.
      at_end: called by process 0 with the run directory and the results.
      at_signal: called with the name of a signal that stops the training after this step.
    Returns:
      The contents of `results.json`.
    Raises:
      UserError: for what cannot be done as asked, and for a loss that is not finite.
      Interrupted: if SIGINT or SIGTERM arrived; the state has been saved.
    """
    workdir = Path(workdir)
    built = experiment.build(config)
    writes = jax.process_index() == 0
    if writes:
        check_run(workdir, built.config)
    checkpoints = checkpoint.Checkpoints(workdir)
    try:
        steps = checkpoints.steps()
        at_start(experiment.describe(built, steps[-1] if steps else 0, workdir))
        results_path = workdir / "results.json"
        if steps and steps[-1] == built.total_steps and results_path.exists():
            results = json.loads(results_path.read_text())
        else:
            state = built.initial_state()
            if steps:
                state = checkpoints.restore(steps[-1], state)
            elif writes:  # only now: a mistake that showed before can be mended in this directory
                metrics.write_json(workdir / "config.json", built.config)
            writer = metrics.Writer(workdir, int(state.step)) if writes else None
            try:
                results = _loop(built, state, checkpoints, writer, at_interval, at_signal)
            finally:
                if writer:
                    writer.close()
            checkpoints.wait()
            if writes:
                metrics.write_json(results_path, results)
    finally:
        checkpoints.close()
    if writes:
        at_end(workdir, results)
    return results


def _loop(built, state, checkpoints, writer, at_interval, at_signal) -> dict:
    config, total = built.config, built.total_steps
    step, mapped, figures, pending, logged = int(state.step), {}, {}, [], int(state.step)
    last = writer.last if writer else {}
    began = time.perf_counter() - last.get("wall_s", 0.0)
    first, since = step + 1, None  # `since`: the step and the time that the rate counts from
    # Steps in flight while the host goes on: few, so that a signal is obeyed soon; none on CPU,
    # where a step that waits slows the one that runs, and collectives of many devices may hang.
    ahead = 0 if jax.default_backend() == "cpu" else 2
    state = update_lib.replicate(state)
    update = update_lib.pmap(update_lib.joint_update(built.recipe), donate=True)

    def write(row):
        if writer:
            writer.write(step, {**row, "wall_s": time.perf_counter() - began})

    def diverged(what):
        steps = checkpoints.steps()
        kept = f"the checkpoint of step {steps[-1]} is kept" if steps else "no checkpoint yet"
        return UserError(
            f"{what}; {kept}; lower config.optim.learning_rate and start in another --workdir"
        )

    def log():
        nonlocal since, logged, figures
        if not pending:
            return
        rows = jax.device_get(pending)
        pending.clear()
        row = {f"train/{key}": float(np.mean([r[key] for r in rows])) for key in rows[0]}
        if not _finite(row):
            losses = ", ".join(f"{k}={v}" for k, v in row.items() if k.endswith("/loss"))
            raise diverged(f"loss is not finite between steps {logged + 1} and {step}: {losses}")
        figures |= row
        shown = {**figures, "step": step, "total_steps": total}
        if since:  # not after the first step, which compiles
            seconds = time.perf_counter() - since[1]
            rate = (step - since[0]) * config["batch_size"] / seconds
            row["train/images_per_s"] = shown["images_per_s"] = rate
            shown["left_s"] = (total - step) * config["batch_size"] / rate
        write(row)
        at_interval(shown)
        logged, since = step, (step, time.perf_counter())

    def evaluate():
        nonlocal since, figures
        networks = {"student": built.recipe.student, "teacher": built.recipe.teacher}
        networks = {name: model for name, model in networks.items() if model is not None}
        found = evaluate_networks(
            networks,
            {name: getattr(state, name).variables for name in networks},
            built.splits,
            config["eval"]["recalibrate_batches"],
            mapped,
            obey,
        )
        if config["eval"]["gradient_shares"]:
            if "shares" not in mapped:
                mapped["shares"] = update_lib.pmap(update_lib.gradient_shares(built.recipe))
            batch = next(built.splits.train_batches(step, step + 1, config["accumulate_steps"]))
            shares = jax.device_get(mapped["shares"](state, batch))
            found |= {f"train/student/share_{key}": float(v) for key, v in shares.items()}
        figures |= found
        write(found)
        at_interval({**figures, "step": step, "total_steps": total})
        since = step, time.perf_counter()
        return found

    def obey():
        if received:
            save()
            raise Interrupted(received[0], step)

    def save(accuracy=None):
        try:
            checkpoints.save(state, accuracy)
        except FloatingPointError as error:
            raise diverged(str(error)) from error

    results: dict = {}
    judged = f"{built.splits.judge}/student/accuracy"
    with _signals(at_signal) as received:
        if step in built.eval_steps and judged not in last:
            results = evaluate()  # a signal had cut it off
        for batch in built.splits.train_batches(step, total, config["accumulate_steps"]):
            state, row = update(state, batch)
            pending.append(row)
            step += 1
            if len(pending) > ahead:
                jax.block_until_ready(pending[-1 - ahead])
            evaluates = step in built.eval_steps
            saves = evaluates or step % config["checkpoint_every_steps"] == 0
            if saves or received or step == first or step % config["log_every_steps"] == 0:
                log()
            obey()
            if evaluates:
                results = evaluate()
            if saves:
                save(results[judged] if evaluates else None)
        results = results or evaluate()
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    versions["pkkd_jax"] = metadata.version("pkkd_jax")
    return {
        **results,
        "steps": total,
        "wall_s": time.perf_counter() - began,
        "versions": versions,
        "device": f"{jax.device_count()} {jax.devices()[0].device_kind}",
    }
