"""The loop: data, step, log, evaluate, checkpoint."""

import contextlib
import dataclasses
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from pkkd_jax import checkpoint, data, distill, metrics, models, optim
from pkkd_jax import config as config_lib
from pkkd_jax import state as state_lib
from pkkd_jax import update as update_lib
from pkkd_jax.names import UserError, unknown
from pkkd_jax.ops import adder

TEACHER_MODES = ("progressive", "fixed", "none")
# Leaves that say where and how fast, and change no result: a run may go on with others.
PLACES = (("data", "data_dir"), ("workers",))


class Interrupted(Exception):
    """A signal asked the training to stop; it has been saved.

    Attributes:
      signum: the signal.
      step: the step that was saved.
    """

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signum).name} and saved at step {step}")
        self.signum, self.step = signum, step


@dataclasses.dataclass(frozen=True)
class Splits:
    """Both splits of a data set, and how they are cut into batches.

    Attributes:
      train: images to learn from, and to recalibrate BatchNorm with.
      test: images to evaluate on.
      batch_size: over all devices.
      seed: of the order of training images and of their crops.
      workers: processes that decode images.
    """

    train: data.Source
    test: data.Source
    batch_size: int
    seed: int
    workers: int

    def train_batches(self, start: int, stop: int, accumulate_steps: int = 1):
        """Training batches of the steps from `start` to before `stop`."""
        return data.train_batches(
            self.train,
            batch_size=self.batch_size,
            seed=self.seed,
            start_step=start,
            stop_step=stop,
            num_devices=jax.device_count(),
            device_slice=_local_devices(),
            accumulate_steps=accumulate_steps,
            workers=self.workers,
        )

    def test_batches(self):
        """All test images, each once."""
        return data.eval_batches(
            self.test,
            batch_size=self.batch_size,
            num_devices=jax.device_count(),
            device_slice=_local_devices(),
            workers=self.workers,
        )


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A configuration, checked and built."""

    config: dict
    splits: Splits
    recipe: update_lib.Recipe
    teacher_variables: dict | None
    total_steps: int
    eval_steps: frozenset[int]


def _local_devices() -> tuple[int, int]:
    count = jax.local_device_count()
    return jax.process_index() * count, (jax.process_index() + 1) * count


def build(config: ConfigDict) -> Experiment:
    """Checks `config` and builds data sources, networks, losses and optimisers.

    Raises:
      UserError: for whatever the configuration asks for and cannot have.
    """
    plain = config_lib.to_json(config)
    _check_numbers(plain)
    train = data.build_source("train", **plain["data"])
    test = data.build_source("test", **plain["data"])
    dtype = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[plain["dtype"]]
    teacher_config = plain["teacher"]
    mode = teacher_config["mode"]
    which = {key: teacher_config.pop(key) for key in ("mode", "run_dir", "which")}
    plain["student"]["num_classes"] = teacher_config["num_classes"] = train.num_classes
    student = models.build(dtype=dtype, **plain["student"])
    teacher = None if mode == "none" else models.build(dtype=dtype, **teacher_config)
    plain["student"]["dtype"] = teacher_config["dtype"] = plain["dtype"]
    for model in filter(None, (student, teacher)):
        images = jax.ShapeDtypeStruct((2, *train.image_shape), jnp.float32)
        jax.eval_shape(
            lambda images, model=model: model.init(jax.random.key(0), images, train=False), images
        )
    teacher_variables = None
    if mode == "fixed":
        teacher_variables = _fixed_teacher(teacher_config, which)
    losses = distill.build(plain["distill"]) if teacher is not None else {}
    if mode == "none":
        # A run without a teacher is the same run whatever the losses' leaves say.
        plain["teacher"], plain["distill"] = {}, {}
    plain["teacher_source"] = which
    batch_size = plain["batch_size"]
    steps_per_epoch = len(train) / batch_size
    total = plain["steps"] or max(1, int(plain["epochs"] * steps_per_epoch))
    every = max(1, round(plain["eval"]["every_epochs"] * steps_per_epoch))
    arguments = plain["optim"]
    distiller_optimiser = optax.sgd(
        optim.schedule(
            arguments["schedule_name"], arguments["learning_rate"], total, arguments["warmup_steps"]
        ),
        momentum=0.9,
    )
    recipe = update_lib.Recipe(
        student=student,
        teacher=teacher,
        teacher_learns=mode == "progressive",
        losses=losses,
        alpha=plain["alpha"],
        optimiser=optim.build(total, **arguments),
        distiller_optimiser=distiller_optimiser,
        augmentation={
            "augmentation": train.augmentation,
            "mean": train.mean,
            "std": train.std,
        },
        seed=plain["seed"],
        label_smoothing=plain["label_smoothing"],
    )
    # The last one is at the end: none so shortly before that it says the same.
    evals = frozenset({*range(every, total - every // 2, every), total})
    splits = Splits(train, test, batch_size, plain["seed"], plain["workers"])
    return Experiment(plain, splits, recipe, teacher_variables, total, evals)


def _check_numbers(config: dict) -> None:
    devices, batch_size = jax.device_count(), config["batch_size"]
    if batch_size < 1:
        raise UserError(f"config.batch_size={batch_size}: it must be positive, for example 256")
    if config["accumulate_steps"] < 1:
        raise UserError(f"config.accumulate_steps={config['accumulate_steps']}: must be 1 or more")
    parts = devices * config["accumulate_steps"]
    if batch_size % parts:
        raise UserError(
            f"config.batch_size={batch_size} does not divide among {devices} devices and"
            f" {config['accumulate_steps']} micro-batches: choose a multiple of {parts}"
        )
    if config["dtype"] not in ("float32", "bfloat16"):
        raise unknown("config.dtype", config["dtype"], ("float32", "bfloat16"))
    if config["teacher"]["mode"] not in TEACHER_MODES:
        raise unknown("config.teacher.mode", config["teacher"]["mode"], TEACHER_MODES)
    for name in ("checkpoint_every_steps", "log_every_steps"):
        if config[name] < 1:
            raise UserError(f"config.{name}={config[name]}: it must be 1 or more")
    if config["steps"] < 0 or (config["steps"] == 0 and config["epochs"] <= 0):
        raise UserError(
            f"config.steps={config['steps']}, config.epochs={config['epochs']}:"
            " one of them must be positive"
        )
    if config["eval"]["every_epochs"] <= 0:
        raise UserError(
            f"config.eval.every_epochs={config['eval']['every_epochs']}: must be above 0"
        )
    if config["eval"]["recalibrate_batches"] < 0:
        raise UserError(
            f"config.eval.recalibrate_batches={config['eval']['recalibrate_batches']}:"
            " it must be 0 (off) or more"
        )


def _fixed_teacher(wanted: dict, source: dict) -> dict:
    if not source["run_dir"]:
        raise UserError(
            "config.teacher.mode='fixed' needs config.teacher.run_dir: the directory of the run"
            " that trained the teacher"
        )
    there = checkpoint.read_config(source["run_dir"]).get(source["which"]) or {}
    ours = {key: value for key, value in wanted.items() if key not in ("dropout", "dtype")}
    theirs = {key: value for key, value in there.items() if key not in ("dropout", "dtype")}
    differing = config_lib.differences(theirs, ours, "config.teacher")
    if there and differing:
        raise UserError(
            f"the {source['which']} in {source['run_dir']!r} is of another architecture:"
            f" {'; '.join(differing)}"
        )
    return checkpoint.load_network(source["run_dir"], source["which"])[1]


def _open_run(workdir: Path, config: dict) -> None:
    """Makes the directory, or checks that it holds a run with this configuration."""
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if any(workdir.iterdir()):
                raise UserError(
                    f"workdir {str(workdir)!r} holds other files and no run:"
                    " choose an empty or new directory with --workdir"
                )
            path.write_text(json.dumps(config, indent=2) + "\n")
            return
    except OSError as error:
        raise UserError(
            f"workdir {str(workdir)!r} cannot be written: {error.strerror};"
            " choose another with --workdir"
        ) from error
    old = json.loads(path.read_text())
    for *parents, leaf in PLACES:
        for tree in (old, new := json.loads(json.dumps(config))):
            for key in parents:
                tree = tree[key]
            tree.pop(leaf, None)
        config = new
    differing = config_lib.differences(old, config)
    if differing:
        raise UserError(
            f"workdir {str(workdir)!r} holds a run with another config ({'; '.join(differing)}):"
            " choose another --workdir, or set these leaves back"
        )


@contextlib.contextmanager
def _signals():
    """Yields a list that receives the first SIGINT or SIGTERM; a second one acts at once."""
    received: list[int] = []
    previous = {}

    def handle(signum, frame):
        del frame
        received.append(signum)
        signal.signal(signum, previous[signum])
        name = signal.Signals(signum).name
        print(f"\n{name}: stopping after this step; again to stop at once", file=sys.stderr)

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
    splits: Splits,
    recalibrate_batches: int,
    mapped: dict,
) -> dict[str, float]:
    """Test figures of networks, with recalibrated and with running BatchNorm statistics.

    Args:
      networks: name to model.
      variables: name to variables, on the devices; they stay as they are.
      splits: the data.
      recalibrate_batches: training batches for the statistics; 0 keeps the running ones.
      mapped: compiled functions by name, kept from call to call; `{}` at first.
    Returns:
      `test/<network>/{accuracy,top5,loss}`, and the same with `_uncalibrated`.
    """
    figures = {}
    source = splits.train
    mean, std = source.mean, source.std
    augmentation = {"augmentation": source.augmentation, "mean": mean, "std": std}
    for name, model in networks.items():
        if name not in mapped:
            mapped[name] = (
                update_lib.pmap(update_lib.evaluation(model, mean, std)),
                update_lib.pmap(update_lib.batch_statistics(model, augmentation)),
            )
        evaluate, statistics = mapped[name]
        raw = update_lib.evaluate(evaluate, variables[name], splits.test_batches())
        figures |= {f"test/{name}/{key}_uncalibrated": value for key, value in raw.items()}
        if recalibrate_batches:
            calibrated = update_lib.recalibrate(
                statistics, variables[name], splits.train_batches(0, recalibrate_batches)
            )
            raw = update_lib.evaluate(evaluate, calibrated, splits.test_batches())
        figures |= {f"test/{name}/{key}": value for key, value in raw.items()}
    return figures


def describe(experiment: Experiment, state: state_lib.DistillState, workdir: Path) -> dict:
    """What a training is about to do, as texts by heading."""
    config, train, test = experiment.config, experiment.splits.train, experiment.splits.test

    def network(name):
        part = getattr(state, name)
        if part is None:
            return "none"
        leaves = config[name]
        count = sum(a.size for a in jax.tree.leaves(part.params))
        text = f"{leaves['name']} {leaves.get('depth', '')}".strip()
        return f"{text}, conv={leaves.get('conv', 'conv')!r}, {count:,} parameters"

    kinds = sorted({d.device_kind for d in jax.devices()})
    mode = config["teacher_source"]["mode"]
    step = int(state.step)
    return {
        "devices": f"{jax.device_count()} {jax.default_backend()} ({', '.join(kinds)}),"
        f" adder op: {adder.implementation()}",
        "data": f"{config['data']['name']}, {len(train):,} train and"
        f" {len(test):,} test images of {'x'.join(map(str, train.image_shape))},"
        f" {train.num_classes} classes",
        "student": network("student"),
        "teacher": network("teacher") + (f", {mode}" if state.teacher is not None else ""),
        "losses": f"{config['alpha']:g} CE"
        + "".join(
            f" + {weight:g} {name}" for name, (weight, _) in experiment.recipe.losses.items()
        ),
        "steps": f"{experiment.total_steps:,} of {config['batch_size']} images"
        f" ({experiment.total_steps * config['batch_size'] / len(train):.1f} epochs),"
        f" {config['dtype']}",
        "directory": f"{workdir}" + (f", resumed at step {step}" if step else ", new"),
    }


def _finite(figures: dict[str, float]) -> bool:
    return all(math.isfinite(v) for k, v in figures.items() if k.endswith("/loss"))


def train_and_evaluate(
    config: ConfigDict,
    workdir: str | Path,
    at_start: Callable[[dict], None] = lambda summary: None,
    at_interval: Callable[[dict], None] = lambda figures: None,
    at_end: Callable[[Path, dict], None] = lambda run_dir, results: None,
) -> dict:
    """Trains what `config` describes in `workdir`, going on where an earlier call stopped.

    Args:
      config: a complete configuration, see `config.base`.
      workdir: the run directory; made if it is not there.
      at_start: called with texts that say what will be done.
      at_interval: called with the latest figures, `step`, `total_steps`, `images_per_s` and
        `left_s`.
      at_end: called by process 0 with the run directory and the results.
    Returns:
      The contents of `results.json`.
    Raises:
      UserError: for what cannot be done as asked, and for a loss that is not finite.
      Interrupted: if SIGINT or SIGTERM arrived; the state has been saved.
    """
    workdir = Path(workdir)
    experiment = build(config)
    writes = jax.process_index() == 0
    if writes:
        _open_run(workdir, experiment.config)
    count = min(experiment.config["batch_size"], 256, len(experiment.splits.train))
    images, _ = data.first_examples(experiment.splits.train, count)
    state = update_lib.init_state(experiment.recipe, images, experiment.teacher_variables)
    checkpoints = checkpoint.Checkpoints(workdir)
    try:
        if checkpoints.steps():
            state = checkpoints.restore(checkpoints.steps()[-1], state)
        at_start(describe(experiment, state, workdir))
        results_path = workdir / "results.json"
        if int(state.step) == experiment.total_steps and results_path.exists():
            results = json.loads(results_path.read_text())
        else:
            writer = metrics.Writer(workdir, int(state.step)) if writes else None
            try:
                results = _loop(experiment, state, checkpoints, writer, at_interval)
            finally:
                if writer:
                    writer.close()
            if writes:
                results_path.write_text(json.dumps(results, indent=2) + "\n")
    finally:
        checkpoints.close()
    if writes:
        at_end(workdir, results)
    return results


def _loop(experiment, state, checkpoints, writer, at_interval) -> dict:
    config, total = experiment.config, experiment.total_steps
    step, mapped, figures, pending, logged = int(state.step), {}, {}, [], int(state.step)
    last = writer.last if writer else {}
    began = time.perf_counter() - last.get("wall_s", 0.0)
    interval = time.perf_counter()
    # XLA's CPU collectives may hang when many steps are in flight.
    block = jax.default_backend() == "cpu" and jax.device_count() > 1
    state = update_lib.replicate(state)
    update = update_lib.pmap(update_lib.joint_update(experiment.recipe), donate=True)

    def write(row):
        if writer:
            writer.write(step, {**row, "wall_s": time.perf_counter() - began})

    def log():
        nonlocal interval, logged, figures
        if not pending:
            return
        rows = jax.device_get(pending)
        pending.clear()
        row = {f"train/{key}": float(np.mean([r[key] for r in rows])) for key in rows[0]}
        if not _finite(row):
            kept = checkpoints.steps()
            raise UserError(
                f"loss is not finite between steps {logged + 1} and {step}:"
                f" {', '.join(f'{k}={v}' for k, v in row.items() if k.endswith('/loss'))};"
                f" {f'the checkpoint of step {kept[-1]} is kept' if kept else 'no checkpoint yet'};"
                " lower config.optim.learning_rate and start in another --workdir"
            )
        rate = (step - logged) * config["batch_size"] / (time.perf_counter() - interval)
        figures |= row
        write({**row, "train/images_per_s": rate})
        left = (total - step) * config["batch_size"] / rate
        at_interval(
            {**figures, "step": step, "total_steps": total, "images_per_s": rate, "left_s": left}
        )
        logged, interval = step, time.perf_counter()

    def evaluate():
        networks = {"student": experiment.recipe.student}
        if state.teacher is not None:
            networks["teacher"] = experiment.recipe.teacher
        return evaluate_networks(
            networks,
            {name: getattr(state, name).variables for name in networks},
            experiment.splits,
            config["eval"]["recalibrate_batches"],
            mapped,
        )

    def save(accuracy=None):
        try:
            checkpoints.save(state, accuracy)
        except FloatingPointError as error:
            kept = checkpoints.steps()
            raise UserError(
                f"{error}: diverged between steps {logged} and {step};"
                f" {f'the checkpoint of step {kept[-1]} is kept' if kept else 'no checkpoint yet'};"
                " lower config.optim.learning_rate and start in another --workdir"
            ) from error

    results: dict = {}
    with _signals() as received:
        for batch in experiment.splits.train_batches(step, total, config["accumulate_steps"]):
            state, row = update(state, batch)
            pending.append(row)
            step += 1
            if block:
                jax.block_until_ready(row)
            evaluates = step in experiment.eval_steps
            saves = evaluates or step % config["checkpoint_every_steps"] == 0
            if saves or received or step % config["log_every_steps"] == 0:
                log()
            if evaluates:
                results = evaluate()
                figures |= results
                write(results)
                at_interval({**figures, "step": step, "total_steps": total})
                interval = time.perf_counter()
            if saves or received:
                save(results["test/student/accuracy"] if evaluates else None)
            if received and step < total:
                raise Interrupted(received[0], step)
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
