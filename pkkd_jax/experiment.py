"""A configuration, checked and built: data, networks, losses, optimisers, steps."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import optax
from flax import linen
from ml_collections import ConfigDict

from pkkd_jax import checkpoint, checks, data, distill, distributed, models, optim, runs
from pkkd_jax import config as config_lib
from pkkd_jax.names import UserError
from pkkd_jax.ops import adder
from pkkd_jax.recipe import Recipe, init_state
from pkkd_jax.splits import Splits
from pkkd_jax.state import DistillState


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
    recipe: Recipe
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
        return init_state(self.recipe, images, self.teacher_variables)


def build(config: ConfigDict) -> Experiment:
    """Checks `config` and builds data sources, networks, losses and optimisers.

    Raises:
      UserError: for whatever the configuration asks for and cannot have.
    """
    plain = config_lib.to_json(config)
    checks.check(plain)
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
    recipe = Recipe(
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
