"""A configuration, checked and built: data, networks, losses, optimisers, steps."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import optax
from flax import linen, traverse_util
from ml_collections import ConfigDict

from pkkd_jax import checkpoint, data, distill, distributed, models, optim, runs
from pkkd_jax import config as config_lib
from pkkd_jax import update as update_lib
from pkkd_jax.names import UserError, unknown
from pkkd_jax.ops import adder
from pkkd_jax.state import DistillState

CHOICES = {
    "teacher.mode": ("progressive", "fixed", "snapshot", "none"),
    "teacher.which": ("student", "teacher"),
}
# Leaf to whether a value is allowed, and what is.
NUMBERS = {
    "max_damaged": (lambda v: v >= 0, "0 (none) or more"),
    "seed": (lambda v: 0 <= v < 2**32, "from 0 to 2**32 - 1"),
    "batch_size": (lambda v: v >= 1, "1 or more, for example 256"),
    "accumulate_steps": (lambda v: v >= 1, "1 or more"),
    "steps": (lambda v: v >= 0, "0 (as many as config.epochs makes) or more"),
    "workers": (lambda v: v >= 0, "0 (threads) or more"),
    "alpha": (lambda v: v >= 0, "0 (no labels) or more"),
    "label_smoothing": (lambda v: 0 <= v < 1, "from 0 to below 1"),
    "optim.cycles": (lambda v: v >= 1, "1 or more"),
    "optim.weight_decay": (lambda v: v >= 0, "0 (none) or more"),
    "optim.adder_eta": (lambda v: v > 0, "above 0"),
    "optim.warmup_steps": (lambda v: v >= 0, "0 (no warm-up) or more"),
    "eval.every_epochs": (lambda v: v > 0, "above 0"),
    "eval.recalibrate_batches": (lambda v: v >= 0, "0 (off) or more"),
    "eval.pictures": (lambda v: v >= 0, "0 (none) or so many evaluations"),
    "checkpoint_every_s": (lambda v: v >= 0, "0 (after every step) or more"),
    "skip_not_finite": (lambda v: v >= 0, "0 (stop at the first) or more"),
    "watchdog_s": (lambda v: v >= 0, "0 (off) or more"),
    "log_every_steps": (lambda v: v >= 1, "1 or more"),
}


@dataclasses.dataclass(frozen=True)
class Splits:
    """Both splits of a data set, and how they are cut into batches.

    Attributes:
      train: images to learn from, and to recalibrate BatchNorm with.
      test: images to evaluate on.
      judge: what they are, "test" or "validation", the first word of their figures.
      batch_size: over all devices.
      seed: of the order of training images and of their crops.
      workers: processes that decode images.
      damage: counts examples that cannot be read.
    """

    train: data.Source
    test: data.Source
    judge: str
    batch_size: int
    seed: int
    workers: int
    damage: data.Damage

    @property
    def augmentation(self) -> dict:
        """Keywords of `data.augment` for the training images."""
        source = self.train
        return {"augmentation": source.augmentation, "mean": source.mean, "std": source.std}

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
            damage=self.damage,
        )

    def test_batches(self):
        """All test images, each once."""
        return data.eval_batches(
            self.test,
            batch_size=self.batch_size,
            num_devices=jax.device_count(),
            device_slice=_local_devices(),
            workers=self.workers,
            damage=self.damage,
        )


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A configuration, checked and built.

    Attributes:
      config: the configuration as plain JSON types, with `num_classes` of the data, and `examples`
        to know them by.
      splits: the data.
      recipe: of the update.
      teacher_variables: of a fixed teacher.
      parameters: number of parameters of each network.
      total_steps: of the whole training.
      eval_steps: after which test images are evaluated.
      picture_steps: of these, after which the training is to be pictured.
    """

    config: dict
    splits: Splits
    recipe: update_lib.Recipe
    teacher_variables: dict | None
    parameters: dict[str, int]
    total_steps: int
    eval_steps: frozenset[int]
    picture_steps: frozenset[int]

    def initial_state(self) -> DistillState:
        """The state before the first step; the losses start from the first training examples."""
        train = self.splits.train
        count = min(self.config["batch_size"], 256, len(train))
        images, _ = data.take(train, np.arange(count), self.splits.damage)
        return update_lib.init_state(self.recipe, images, self.teacher_variables)


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
    damage = data.Damage(plain["max_damaged"])
    train = data.build_source("train", damage, **plain["data"])
    judge = "validation" if plain["data"].setdefault("validation", 0) else "test"
    test = data.build_source(judge, damage, **plain["data"])
    plain["num_classes"] = train.num_classes
    plain["examples"] = data.fingerprint(train, test, damage)
    networks, parameters = {"teacher": None}, {}
    for which in ("student", "teacher"):
        arguments = runs.network_arguments(plain, which)
        if arguments is not None:
            networks[which] = models.build(**arguments)
            parameters[which] = _count_parameters(networks[which], train.image_shape)
    teacher, mode = networks["teacher"], plain["teacher"]["mode"]
    teacher_variables = (
        _fixed_teacher(plain, teacher, train.image_shape) if mode == "fixed" else None
    )
    batch_size = plain["batch_size"]
    splits = Splits(train, test, judge, batch_size, plain["seed"], plain["workers"], damage)
    steps_per_epoch = len(train) / batch_size
    total = plain["steps"] or int(plain["epochs"] * steps_per_epoch)
    if not total:
        raise UserError(
            f"config.batch_size={batch_size}: config.epochs={plain['epochs']} times"
            f" {len(train)} images are fewer; choose a smaller batch, or set config.steps"
        )
    every = max(1, round(plain["eval"]["every_epochs"] * steps_per_epoch))
    losses = distill.build(plain["distill"], total) if teacher is not None else {}
    arguments = plain["optim"]
    cycles = arguments["cycles"]
    if cycles > total:
        raise UserError(f"config.optim.cycles={cycles}: it must be at most the {total} steps")
    if arguments["warmup_steps"] >= total:
        raise UserError(
            f"config.optim.warmup_steps={arguments['warmup_steps']}: it must be below the {total}"
            " steps of the training"
        )
    snapshots = tuple(total // cycles * cycle for cycle in range(1, cycles))
    rate = optim.schedule(
        arguments["schedule_name"],
        arguments["learning_rate"],
        total,
        arguments["warmup_steps"],
        cycles,
    )
    recipe = update_lib.Recipe(
        student=networks["student"],
        teacher=teacher,
        teacher_learns=mode == "progressive",
        losses=losses,
        alpha=plain["alpha"],
        optimiser=optim.build(total, **arguments),
        distiller_optimiser=optax.sgd(rate, momentum=0.9),
        augmentation=splits.augmentation,
        seed=plain["seed"],
        label_smoothing=plain["label_smoothing"],
        snapshots=snapshots if mode == "snapshot" else (),
    )
    # The last one is at the end: none so shortly before that it says the same.
    evals = frozenset({*range(every, total - every // 2, every), total})
    pictures = plain["eval"]["pictures"]
    pictured = frozenset(sorted(evals)[pictures - 1 :: pictures] if pictures else ())
    return Experiment(plain, splits, recipe, teacher_variables, parameters, total, evals, pictured)


def _count_parameters(model: linen.Module, image_shape: tuple[int, ...]) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(model, image_shape)["params"]))


def shapes(model: linen.Module, image_shape: tuple[int, ...]) -> dict:
    """Shapes of the variables of `model`, which refuses images that it cannot take."""
    images = jax.ShapeDtypeStruct((2, *image_shape), np.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)


def _leaf(config: dict, path: str):
    for key in path.split("."):
        config = config[key]
    return config


def _check(config: dict) -> None:
    for path, value in traverse_util.flatten_dict(config, sep=".").items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config.{path}={value}: it must be finite")
    for path, allowed in CHOICES.items():
        if _leaf(config, path) not in allowed:
            raise unknown(f"config.{path}", _leaf(config, path), allowed)
    for path, (is_allowed, allowed) in NUMBERS.items():
        if not is_allowed(_leaf(config, path)):
            raise UserError(f"config.{path}={_leaf(config, path)}: it must be {allowed}")
    if config["teacher"]["mode"] == "snapshot" and config["optim"]["cycles"] < 2:
        raise UserError(
            "config.teacher.mode='snapshot' with config.optim.cycles=1: the teacher is the student"
            " at the end of the cycle before; set config.optim.cycles to 2 or more"
        )
    if config["steps"] == 0 and not config["epochs"] > 0:
        raise UserError(
            f"config.steps=0 and config.epochs={config['epochs']}: one of them must be positive"
        )
    run_dir, mode = config["teacher"]["run_dir"], config["teacher"]["mode"]
    if run_dir and mode != "fixed":
        raise UserError(
            f"config.teacher.run_dir={run_dir!r} with config.teacher.mode={mode!r}, which has no"
            " use for it: set config.teacher.mode to 'fixed', or leave the directory out"
        )
    devices, batch_size = jax.device_count(), config["batch_size"]
    parts = devices * config["accumulate_steps"]
    if batch_size % parts:
        raise UserError(
            f"config.batch_size={batch_size} does not divide among {devices} devices and"
            f" {config['accumulate_steps']} micro-batches: choose a multiple of {parts}"
        )


def _fixed_teacher(config: dict, model: linen.Module, image_shape: tuple[int, ...]) -> dict:
    """Variables for the teacher `model` from the run that `config.teacher` names."""
    run_dir, which = config["teacher"]["run_dir"], config["teacher"]["which"]
    if not run_dir:
        raise UserError(
            "config.teacher.mode='fixed' needs config.teacher.run_dir: the directory of the run"
            " that trained the teacher"
        )
    if not distributed.first():  # which alone needs the directory
        variables = dict(shapes(model, image_shape))
        return distributed.from_first(jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), variables))
    theirs = runs.network_arguments(runs.read_config(run_dir), which)
    if theirs:
        ours = runs.network_arguments(config, "teacher")
        for arguments in (theirs, ours):
            for key in ("dropout", "dtype"):  # of training only
                arguments.pop(key, None)
        differing = config_lib.differences(theirs, ours, "config.teacher")
        if differing:
            raise UserError(
                f"the {which} in {run_dir!r} is of another architecture: {'; '.join(differing)}"
            )
    return distributed.from_first(checkpoint.load_network(run_dir, which, model=model)[1])


def describe(experiment: Experiment, step: int, workdir: Path, cost_line: str) -> dict:
    """What a training that stands at `step` is about to do in `workdir`, as texts by heading."""
    config, train, test = experiment.config, experiment.splits.train, experiment.splits.test

    def network(name):
        if name not in experiment.parameters:
            return "none"
        if name == "teacher" and config["teacher"]["mode"] == "snapshot":
            return f"the student at the end of the cycle before, {config['optim']['cycles']} cycles"
        leaves = config[name]
        text = f"{leaves['name']} {leaves.get('depth', '')}".strip()
        if leaves.get("width_multiplier", 1.0) != 1.0:
            text += f" of {leaves['width_multiplier']:g} times the width"
        text += f", conv={leaves.get('conv', 'conv')!r}"
        text += f", {experiment.parameters[name]:,} parameters"
        return text + (f", {leaves['mode']}" if "mode" in leaves else "")

    def weight(name):
        by_step = experiment.recipe.losses[name][0]
        if not callable(by_step):
            return f"{by_step:g}"
        first, last = (f"{float(by_step(step)):g}" for step in (0, experiment.total_steps))
        return first if first == last else f"{first}..{last}"

    losses = f"{config['alpha']:g} CE"
    losses += "".join(f" + {weight(name)} {name}" for name in experiment.recipe.losses)
    if experiment.recipe.teacher is not None and not experiment.recipe.losses:
        losses += ", nothing from the teacher (config.teacher.mode=none leaves it out)"
    kinds = sorted({d.device_kind for d in jax.devices()})
    return {
        "devices": f"{jax.device_count()} {jax.default_backend()} ({', '.join(kinds)}),"
        f" adder op: {adder.implementation()}",
        "data": f"{config['data']['name']}, {len(train):,} train and"
        f" {len(test):,} {experiment.splits.judge} images of"
        f" {'x'.join(map(str, train.image_shape))},"
        f" {train.num_classes} classes",
        "student": network("student"),
        "teacher": network("teacher"),
        "cost": cost_line,
        "losses": losses,
        "steps": f"{experiment.total_steps:,} of {config['batch_size']} images"
        f" ({experiment.total_steps * config['batch_size'] / len(train):.1f} epochs),"
        f" {config['dtype']}",
        "directory": f"{workdir}" + (f", resumed at step {step}" if step else ", new"),
    }
