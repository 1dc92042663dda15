"""Evaluates the networks of a run afresh.

python -m pkkd_jax.evaluate RUN_DIR [--split=train] [--data=NAME] [--step=best] [--trust]
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import argparse
import inspect
import json
import sys

import flax
import jax
import numpy as np
from absl import logging

from pkkd_jax import checkpoint, data, devices, evaluation, experiment, models, names, runs


def evaluate(
    run_dir: str,
    step: str | int = "last",
    data_name: str = "",
    data_dir: str = "",
    batch_size: int = 0,
    split: str = "test",
    trust: bool = False,
) -> dict[str, float]:
    """Figures of a run's student and teacher.

    Args:
      run_dir: a directory that a training wrote.
      step: "last", "best" or a saved step.
      data_name: another data set with as many classes, read at the run's image size where it has
        that keyword; the run's own if "".
      data_dir: where its files are; the run's own place if "".
      batch_size: over all devices; the run's own if 0.
      split: "test"; "train", whose images are then not augmented either; or "validation", what the
        run held out.
      trust: whether networks and data from outside the package, which the run names, are imported.
    Returns:
      `<split>/<network>/{accuracy,top5,loss}`, and the same with `_uncalibrated`.
    Raises:
      UserError: if there is no such run, step or data set.
    """
    if batch_size < 0:
        raise names.UserError(f"{batch_size=}: it must be 0 (the run's own) or more")
    config = runs.read_config(run_dir)
    arguments = dict(config["data"])
    if data_name and data_name != arguments["name"]:
        source = names.resolve("pkkd_jax.data.sources", data_name, "data set")
        kept = {"data_dir", "image_size"} & set(inspect.signature(source).parameters)
        arguments = {key: arguments[key] for key in kept & set(arguments)} | {"name": data_name}
    elif not trust:
        remedy = "--trust imports it, or name another data set by --data"
        runs.refuse_outside(run_dir, config, ["data"], remedy)
    if data_dir:
        arguments["data_dir"] = data_dir
    if split == "validation" and not arguments.get("validation"):
        raise names.UserError(
            f"split='validation': the run in {str(run_dir)!r} held out nothing of"
            f" {arguments['name']!r}; choose test or train"
        )
    damage = data.Damage(config["max_damaged"])
    train = data.build_source("train", damage, **arguments)
    judged = train if split == "train" else data.build_source(split, damage, **arguments)
    size = batch_size or config["batch_size"]
    size = -(-size // jax.device_count()) * jax.device_count()
    splits = experiment.Splits(
        train, judged, split, size, config["seed"], config["workers"], damage
    )
    networks, variables = {}, {}
    for which in ("student", "teacher"):
        keywords = runs.network_arguments(config, which)
        if keywords is not None:
            model = models.build(**keywords) if trust else None
            networks[which], found = checkpoint.load_network(run_dir, which, step, model)
            _check_images(networks[which], found, splits.train.image_shape, arguments["name"])
            variables[which] = devices.replicate(found)
    if config["num_classes"] != splits.train.num_classes:
        raise names.UserError(
            f"data set {arguments['name']!r} has {splits.train.num_classes} classes, the networks"
            f" {config['num_classes']}"
        )
    recalibrate_batches = config["eval"]["recalibrate_batches"]
    return evaluation.evaluate_networks(networks, variables, splits, recalibrate_batches, {})


def _check_images(model, variables, shape: tuple[int, ...], name: str) -> None:
    images = jax.ShapeDtypeStruct((1, *shape), np.float32)
    try:
        jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, images)
    except flax.errors.ScopeParamShapeError as error:
        raise names.UserError(
            f"data set {name!r} has images of {'x'.join(map(str, shape))}, on which the network was"
            " not trained: choose one whose images have the same shape"
        ) from error


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    logging.set_verbosity(logging.ERROR)
    parser = argparse.ArgumentParser("python -m pkkd_jax.evaluate")
    parser.add_argument("run_dir", help="directory that a training wrote")
    parser.add_argument("--data", default="", help="another data set")
    parser.add_argument("--data_dir", default="", help="where the data set's files are")
    parser.add_argument("--split", default="test", choices=("test", "train", "validation"))
    parser.add_argument("--step", default="last", help="last, best, or a saved step")
    parser.add_argument(
        "--trust", action="store_true", help="import the run's networks and data of your own"
    )
    parser.add_argument("--batch_size", type=int, default=0, help="default: the run's")
    given = parser.parse_args(argv)
    try:
        figures = evaluate(
            given.run_dir,
            given.step,
            given.data,
            given.data_dir,
            given.batch_size,
            given.split,
            given.trust,
        )
    except (names.UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(figures, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
