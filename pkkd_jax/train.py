"""A training: a configuration, built, in its run directory."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from pkkd_jax import (
    checkpoint,
    cost,
    distributed,
    experiment,
    loop,
    metrics,
    provenance,
    runs,
    stopping,
    workdirs,
)
from pkkd_jax import config as config_lib
from pkkd_jax.state import DistillState


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
      stopping.Interrupted: if SIGINT or SIGTERM arrived, in any process; the state has been saved.
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
            steps = loop.Loop(
                built, state, checkpoints, writer, watchdog, at_interval, at_signal, at_picture
            )
            results = origin | steps.run()
            if writes:
                checkpoints.wait()
                metrics.write_json(workdir / "results.json", results)
    if writes:
        at_end(workdir, results)
    return results or {}
