"""Configurations: the defaults of every leaf, arguments after the colon, and comparison."""

import inspect
import json
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from pkkd_jax import distill, names, optim


def base() -> ConfigDict:
    """The configuration that every file in `configs/` starts from: CIFAR-10 by the paper's recipe.

    Each nested dict holds exact keyword arguments: `student` and `teacher` of the model, but for
    `teacher.mode`, `run_dir` and `which`; `distill.<name>` of the loss, but for `weight`,
    `weight_schedule` and `final_weight`; `data` of the data source; `optim` of `optim.build`.
    """
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 256  # over all devices
    config.epochs = 400
    config.steps = 0  # replaces epochs where above 0
    config.dtype = "float32"  # of the computation, or "bfloat16"
    config.accumulate_steps = 1  # micro-batches that make one step
    # `validation`: training images that are held out, and judge in the place of the test images.
    config.data = dict(name="cifar10", data_dir="", validation=0)
    config.max_damaged = 10  # examples that cannot be read and may be left out
    config.workers = 0  # processes that decode images; 0: threads of this one
    config.student = dict(
        name="resnet_cifar", depth=20, width_multiplier=1.0, conv="adder", dropout=0.0
    )
    config.teacher = dict(
        mode="progressive",  # or "fixed", "snapshot" (of the student, each cycle), "none"
        run_dir="",  # of a fixed teacher
        which="teacher",  # network of that run
        name="resnet_cifar",
        depth=20,
        width_multiplier=1.0,
        conv="conv",
        dropout=0.0,
    )
    config.alpha = 1.0
    config.label_smoothing = 0.0
    config.distill = losses("pkkd")
    config.optim = dict(
        name="sgd",
        learning_rate=0.1,
        schedule_name="cosine",
        cycles=1,  # of the schedule
        warmup_steps=0,
        weight_decay=5e-4,
        adder_eta=0.2,
        momentum=0.9,
    )
    # `pictures`: every so many evaluations TensorBoard gets histograms and pictures; 0: never.
    config.eval = dict(every_epochs=1.0, recalibrate_batches=20, gradient_shares=False, pictures=0)
    config.log_every_steps = 50
    config.checkpoint_every_s = 100.0  # with the step and the saving, two minutes can be lost
    config.keep_evaluated = False  # every evaluation's checkpoint, and not the best one's alone
    config.skip_not_finite = 0  # updates that may be left out since the start of the program
    config.watchdog_s = 1800.0  # without a step, after which the program ends; 0: never
    config.compilation_cache_dir = ""  # where compiled programs are kept for the next start
    return config.lock()  # whole dicts can still be replaced


def _defaults(function: Callable) -> dict[str, Any]:
    """The keywords of `function` that can be leaves, with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, (bool, int, float, str))}


def losses(methods: str) -> dict[str, Any]:
    """`config.distill` for "NAME" or "NAME+NAME", each with the defaults of its keywords.

    "pkkd" alone includes KD, as in the paper. A dotted name becomes nested dicts, since a leaf's
    name has no dots.
    """
    if methods == "none":
        return {}
    found: dict[str, Any] = {}
    wanted = ("pkkd+kd" if methods == "pkkd" else methods).split("+")
    if len(set(wanted)) < len(wanted):
        raise names.UserError(f"distill={methods}: a loss is named twice; each has one weight")
    for each in wanted:
        *parents, last = each.split(".")
        place = found
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = {
            **distill.WEIGHT,
            "weight": distill.DEFAULT_WEIGHTS.get(each, 1.0),
            **_defaults(names.resolve("pkkd_jax.distill", each, "loss")),
        }
    return found


PARTS = ("data", "distill", "optim", "student", "teacher")  # what an argument can swap
# Leaves that stay, or are added, whatever else a part of the configuration has.
COMMON = {
    "data": ("data_dir", "validation"),
    "eval": ("every_epochs", "recalibrate_batches", "gradient_shares", "pictures"),
    "optim": tuple(inspect.signature(optim.build).parameters),
    "teacher": ("mode", "run_dir", "which"),
}


def with_argument(config: ConfigDict, argument: str | None) -> ConfigDict:
    """Applies what stands after the colon of `--config=FILE:key=value,key=value`, and locks.

    What `data`, `eval`, `optim` and `teacher` have always is added where a file left it out.

    Args:
      config: a configuration.
      argument: `data=NAME`, `distill=NAME+NAME` ("none" for no loss), `optim=NAME`, `student=NAME`
        and `teacher=NAME` swap a whole nested dict, which a locked configuration cannot do leaf by
        leaf.
    Raises:
      UserError: for an unknown key or name.
    """
    for item in filter(None, (argument or "").split(",")):
        key, equals, value = item.partition("=")
        if key not in PARTS or not equals:
            raise names.UserError(
                f"argument {item!r} of the config: expected data=NAME, distill=NAME, optim=NAME,"
                " student=NAME or teacher=NAME, with commas between; every other leaf is"
                " --config.LEAF=VALUE"
            )
        if key == "distill":
            config.distill = losses(value)
        elif config[key].name == value:
            pass  # with the leaves that it has
        elif key == "data":
            leaves = _defaults(names.resolve("pkkd_jax.data.sources", value, "data set"))
            leaves.pop("split", None)
            old = {k: v for k, v in config.data.items() if k in COMMON["data"]}
            config.data = {**leaves, **old, "name": value}
        else:
            if key == "optim":
                function, kept = optim.optimiser(value), COMMON["optim"]
            else:
                function = names.resolve("pkkd_jax.models", value, "model")
                kept = (*COMMON["teacher"], "conv")
            old = {k: v for k, v in config[key].to_dict().items() if k in kept}
            config[key] = {**_defaults(function), **old, "name": value}
    defaults = base()
    for part, leaves in COMMON.items():
        common = {leaf: defaults[part][leaf] for leaf in leaves if leaf in defaults[part]}
        config[part] = {**common, **config[part].to_dict()}
    return config.lock()


def to_json(config: ConfigDict) -> dict:
    """`config` as plain JSON types."""
    return json.loads(json.dumps(config.to_dict()))


def differences(old: dict, new: dict, prefix: str = "config") -> list[str]:
    """Leaves in which two configurations differ, one text each: `config.seed: 0 there, 1 here`."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}.{key}")
        elif a != b:
            found.append(f"{prefix}.{key}: {a!r} there, {b!r} here")
    return found
