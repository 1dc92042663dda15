"""A configuration, checked and built: data, networks, losses, optimisers, steps."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from pkkd_jax import checkpoint, data, distill, models, optim
from pkkd_jax import config as config_lib
from pkkd_jax import state as state_lib
from pkkd_jax import update as update_lib
from pkkd_jax.names import UserError, unknown
from pkkd_jax.ops import adder

CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "teacher.mode": ("progressive", "fixed", "none"),
}
# Leaf to whether a value is allowed, and what is.
NUMBERS = {
    "batch_size": (lambda v: v >= 1, "1 or more, for example 256"),
    "accumulate_steps": (lambda v: v >= 1, "1 or more"),
    "steps": (lambda v: v >= 0, "0 (as many as config.epochs makes) or more"),
    "workers": (lambda v: v >= 0, "0 (threads) or more"),
    "label_smoothing": (lambda v: 0 <= v < 1, "from 0 to below 1"),
    "optim.warmup_steps": (lambda v: v >= 0, "0 (no warm-up) or more"),
    "eval.every_epochs": (lambda v: v > 0, "above 0"),
    "eval.recalibrate_batches": (lambda v: v >= 0, "0 (off) or more"),
    "checkpoint_every_steps": (lambda v: v >= 1, "1 or more"),
    "log_every_steps": (lambda v: v >= 1, "1 or more"),
}


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
    _check(plain)
    train = data.build_source("train", **plain["data"])
    test = data.build_source("test", **plain["data"])
    teacher_config = plain["teacher"]
    mode = teacher_config["mode"]
    which = {key: teacher_config.pop(key) for key in ("mode", "run_dir", "which")}
    shared = {"num_classes": train.num_classes}
    if plain["dtype"] != "float32":  # a model of the user's own need not have the field
        shared["dtype"] = plain["dtype"]
    plain["student"] |= shared
    teacher_config |= shared
    student = models.build(**plain["student"])
    teacher = None if mode == "none" else models.build(**teacher_config)
    for model in filter(None, (student, teacher)):
        images = jax.ShapeDtypeStruct((2, *train.image_shape), np.float32)
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


def _leaf(config: dict, path: str):
    for key in path.split("."):
        config = config[key]
    return config


def _check(config: dict) -> None:
    for path, allowed in CHOICES.items():
        if _leaf(config, path) not in allowed:
            raise unknown(f"config.{path}", _leaf(config, path), allowed)
    for path, (is_allowed, allowed) in NUMBERS.items():
        if not is_allowed(_leaf(config, path)):
            raise UserError(f"config.{path}={_leaf(config, path)}: it must be {allowed}")
    if config["steps"] == 0 and not config["epochs"] > 0:
        raise UserError(
            f"config.steps=0 and config.epochs={config['epochs']}: one of them must be positive"
        )
    devices, batch_size = jax.device_count(), config["batch_size"]
    parts = devices * config["accumulate_steps"]
    if batch_size % parts:
        raise UserError(
            f"config.batch_size={batch_size} does not divide among {devices} devices and"
            f" {config['accumulate_steps']} micro-batches: choose a multiple of {parts}"
        )


def _fixed_teacher(wanted: dict, source: dict) -> dict:
    if not source["run_dir"]:
        raise UserError(
            "config.teacher.mode='fixed' needs config.teacher.run_dir: the directory of the run"
            " that trained the teacher"
        )
    there = checkpoint.read_config(source["run_dir"]).get(source["which"]) or {}
    ours, theirs = (
        {key: value for key, value in leaves.items() if key not in ("dropout", "dtype")}
        for leaves in (wanted, there)
    )
    differing = config_lib.differences(theirs, ours, "config.teacher")
    if there and differing:
        raise UserError(
            f"the {source['which']} in {source['run_dir']!r} is of another architecture:"
            f" {'; '.join(differing)}"
        )
    return checkpoint.load_network(source["run_dir"], source["which"])[1]


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
