"""The loop: data, step, log, evaluate, checkpoint."""

import collections
import contextlib
import json
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from pkkd_jax import (
    checkpoint,
    cost,
    devices,
    diagnosis,
    distributed,
    evaluation,
    experiment,
    metrics,
    provenance,
    runs,
    stopping,
    workdirs,
)
from pkkd_jax import config as config_lib
from pkkd_jax import update as update_lib
from pkkd_jax.names import UserError
from pkkd_jax.recipe import hyperparameters
from pkkd_jax.state import DistillState


class Interrupted(Exception):
    """A signal asked the training to stop; it has been saved.

    Attributes:
      signum: the signal.
      step: the step that was saved.
    """

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signum).name} and saved at step {step}")
        self.signum, self.step = signum, step


def train_and_evaluate(
    config: ConfigDict,
    workdir: str | Path,
    at_start: Callable[[dict], None] = lambda summary: None,
    at_interval: Callable[[dict], None] = lambda figures: None,
    at_end: Callable[[Path, dict], None] = lambda run_dir, results: None,
    at_signal: Callable[[str], None] = lambda name: None,
    at_picture: Callable[[experiment.Experiment, DistillState], None] = lambda built, state: None,
) -> dict:
    """Trains what `config` describes in `workdir`, going on where an earlier call stopped.

    Args:
      config: a complete configuration, see `config.base`.
      workdir: the run directory; made if it is not there.
      at_start: called with texts that say what will be done.
      at_interval: called with the latest figures, `step`, `total_steps`, `images_per_s` and
        `left_s`.
      at_end: called with the run directory and the results.
      at_signal: called with the name of a signal that stops the training after this step.
      at_picture: called with the experiment and its state, as NumPy arrays, every
        `config.eval.pictures` evaluations.
    Of several processes all call this, and the first alone writes and calls back.
    Returns:
      The figures of `results.json`; `{}` in the other processes if the run was finished before.
    Raises:
      UserError: for what cannot be done as asked, and for updates that are not finite.
      Interrupted: if SIGINT or SIGTERM arrived, in any process; the state has been saved.
    """
    workdir, writes = Path(workdir), distributed.first()
    if config.compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache_dir)
    shared = workdirs.without(config_lib.to_json(config), workdirs.OWN)
    shared = json.dumps(shared, sort_keys=True)
    distributed.require_same(shared, "configuration")
    built = experiment.build(config)
    labels = {**built.config["examples"], "pixel_mean": None}  # decoders differ
    distributed.require_same(str(labels), "data set")
    checkpoints = found = results = None
    begun = 0  # the steps that are done
    with contextlib.ExitStack() as at_exit:
        watchdog = at_exit.enter_context(contextlib.closing(stopping.Watchdog(config.watchdog_s)))
        if writes:
            workdirs.require_same_run(workdir, built.config)
            at_exit.enter_context(workdirs.alone(workdir))
            checkpoints = checkpoint.Checkpoints(
                workdir, keep_evaluated=built.config["keep_evaluated"]
            )
            at_exit.callback(checkpoints.close)
            found = checkpoints.newest()
            begun = found[0] if found else 0
            if begun in (0, built.total_steps):
                results = metrics.read_json(workdir / "results.json")
                begun = built.total_steps if results else begun
            if found and built.teacher_variables is not None:
                teacher = built.config["teacher"]["run_dir"]
                workdirs.require_same_teacher(
                    workdir, found[1]["teacher"], teacher, built.teacher_variables
                )
            arguments = runs.network_arguments(built.config, "student")
            costs, cost_line = cost.described(arguments, built.splits.train.image_shape)
            at_start(experiment.describe(built, begun, workdir, cost_line))
        step, done = distributed.from_first(np.array([begun, results is not None], np.int32))
        if not done:
            state, writer = built.initial_state(), None
            if found:
                state = checkpoint.fill(state, *found)
            state = distributed.from_first(state)
            if writes:
                if not found:  # only now: what was wrong before can be mended in this directory
                    metrics.write_json(workdir / "config.json", built.config)
                if costs:
                    cost.write(workdir, costs)
                writer = metrics.Writer(workdir, int(step))
                at_exit.callback(writer.close)
            # Now: a commit may follow while the training runs.
            origin = {"starts": provenance.history(workdir, int(step))} if writes else {}
            results = origin | _loop(
                built, state, checkpoints, writer, watchdog, at_interval, at_signal, at_picture
            )
            if writes:
                checkpoints.wait()
                metrics.write_json(workdir / "results.json", results)
    if writes:
        at_end(workdir, results)
    return results or {}


def _loop(built, state, checkpoints, writer, watchdog, at_interval, at_signal, at_picture) -> dict:
    config, total = built.config, built.total_steps
    step, mapped, figures, pending, logged = int(state.step), {}, {}, [], int(state.step)
    last = writer.last if writer else {}
    judged = f"{built.splits.judge}/student/accuracy"
    began = time.perf_counter() - last.get("wall_s", 0.0)
    saved_at = time.perf_counter()
    first, since = step + 1, None  # `since`: the step and the time that the rate counts from
    # Steps in flight while the host goes on: few, so that a signal is obeyed soon; none on CPU,
    # where a step that waits slows the one that runs, and collectives of many devices may hang.
    ahead = 0 if jax.default_backend() == "cpu" else 2
    unchecked: collections.deque = collections.deque()  # steps that may be under way, and figures
    skipped = 0
    state, given = devices.replicate(state), hyperparameters(built.recipe)
    update = devices.pmap(update_lib.joint_update(built.recipe), given, donate=True)
    agreement = stopping.Agreement(ahead)

    def write(row):
        if writer:
            writer.write(step, {**row, "wall_s": time.perf_counter() - began})

    def check(under_way=0):
        """Waits for all steps but so many, and sees whether their updates were finite."""
        nonlocal skipped
        while len(unchecked) > under_way:
            at, row = unchecked.popleft()
            if not jax.device_get(row["finite"]):
                skipped += 1
                not_finite(at)

    def not_finite(at):
        batch = next(built.splits.train_batches(at - 1, at, config["accumulate_steps"]))
        what = diagnosis.first_not_finite(built.recipe, state.replace(step=np.int32(at - 1)), batch)
        limit, text = config["skip_not_finite"], f"step {at}: {what} not finite"
        if at != step:
            text += f" (looked for with the parameters of step {step})"
        if skipped <= limit:
            warnings.warn(f"{text}; update {skipped} of at most {limit} left out", stacklevel=2)
            return
        steps = checkpoints.steps() if checkpoints else []
        kept = f"the checkpoint of step {steps[-1]} is kept" if steps else "no checkpoint yet"
        raise UserError(
            f"{text}; {kept}; lower config.optim.learning_rate or a weight in config.distill and"
            " start in another --workdir, or leave out such updates by config.skip_not_finite (now"
            f" {limit})"
        )

    def log():
        nonlocal since, logged, figures
        check()
        if not pending:
            return
        rows = jax.device_get(pending)
        pending.clear()
        rows = [row for row in rows if row.pop("finite")] or rows
        row = {f"train/{key}": float(np.mean([r[key] for r in rows])) for key in rows[0]}
        if skipped:
            row["train/skipped_updates"] = skipped
        figures |= row
        shown = {**figures, "step": step, "total_steps": total}
        if since:  # not after the first step, which compiles
            seconds = time.perf_counter() - since[1]
            rate = (step - since[0]) * config["batch_size"] / seconds
            row["train/images_per_s"] = shown["images_per_s"] = rate
            shown["left_s"] = (total - step) * config["batch_size"] / rate
        write(row)
        if writer:
            at_interval(shown)
        logged, since = step, (step, time.perf_counter())

    def evaluate():
        nonlocal since, figures
        networks = {"student": built.recipe.student, "teacher": built.recipe.teacher}
        networks = {name: model for name, model in networks.items() if model is not None}
        found = evaluation.evaluate_networks(
            networks,
            {name: getattr(state, name).variables for name in networks},
            built.splits,
            config["eval"]["recalibrate_batches"],
            mapped,
            lambda: obey(wishes()),
        )
        if config["eval"]["gradient_shares"]:
            if "shares" not in mapped:
                mapped["shares"] = devices.pmap(diagnosis.gradient_shares(built.recipe), given)
            batch = next(built.splits.train_batches(step, step + 1, config["accumulate_steps"]))
            shares = jax.device_get(mapped["shares"](state, batch))
            found |= {f"train/student/share_{key}": float(v) for key, v in shares.items()}
        figures |= found
        write(found)
        if writer:
            at_interval({**figures, "step": step, "total_steps": total})
        since = step, time.perf_counter()
        return found

    def wishes():
        """A signal that some process received, or 1 if it is time to save, or 0."""
        watchdog.alive()
        due = time.perf_counter() - saved_at >= config["checkpoint_every_s"]
        return agreement.largest(received[0] if received else int(due))

    def obey(wish):
        if wish > 1:
            save()
            raise Interrupted(wish, step)

    def save(accuracy=None):
        nonlocal saved_at
        if checkpoints:
            checkpoints.save(state, accuracy)
        saved_at = time.perf_counter()
        agreement.asked.clear()  # what was asked before does not ask for another

    def evaluate_and_save():
        nonlocal since
        found = evaluate()
        save(found[judged])
        if writer and step in built.picture_steps:
            at_picture(built, jax.device_get(state))
            since = step, time.perf_counter()
        return found

    results: dict = {}
    with stopping.signals(at_signal) as received:
        missing = step in built.eval_steps and judged not in last
        if distributed.from_first(np.int32(missing)):
            results = evaluate_and_save()  # a signal had cut it off
        for batch in built.splits.train_batches(step, total, config["accumulate_steps"]):
            state, row = update(state, batch)
            pending.append(row)
            step += 1
            unchecked.append((step, row))
            check(ahead)
            wish, evaluates = wishes(), step in built.eval_steps
            if evaluates or wish or step == first or step % config["log_every_steps"] == 0:
                log()
                wish = max(wish, wishes())
            obey(wish)
            if evaluates:
                results = evaluate_and_save()
            elif wish:
                save()
        results = results or evaluate()
    return {**results, "steps": total, "wall_s": time.perf_counter() - began}
