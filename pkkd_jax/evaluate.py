"""Evaluates the networks of a run afresh.

python -m pkkd_jax.evaluate RUN_DIR [--split=test|train|validation] [--step=last|best|N]
    [--data=NAME] [--data_dir=DIR] [--batch_size=N] [--trust]
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import argparse
import inspect
import json
import sys

import jax
from absl import logging
from flax import linen, traverse_util

from pkkd_jax import checkpoint, data, devices, evaluation, experiment, models, names, runs
from pkkd_jax.splits import Splits


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
      step: "last", "best" (by the student's accuracy on the images that the run was judged by, its
        test images unless some were held out) or a saved step.
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
      UserError: if there is no such run, step or data set, or the networks do not fit its images.
    """
    config, splits = _read(run_dir, data_name, data_dir, batch_size, split, trust)
    networks, variables = {}, {}
    for which in ("student", "teacher"):
        if runs.network_arguments(config, which) is not None:
            networks[which], found = _network(run_dir, config, which, step, splits, trust)
            variables[which] = devices.replicate(found)
    if config["num_classes"] != splits.train.num_classes:
        raise names.UserError(
            f"data set {data_name or config['data']['name']!r} has {splits.train.num_classes}"
            f" classes, the networks {config['num_classes']}"
        )
    recalibrate_batches = config["eval"]["recalibrate_batches"]
    return evaluation.evaluate_networks(networks, variables, splits, recalibrate_batches, {})


def calibrated(
    run_dir: str,
    which: str = "student",
    step: str | int = "last",
    data_dir: str = "",
    trust: bool = False,
) -> tuple[linen.Module, dict]:
    """One trained network with the recalibrated statistics that its figures were measured with.

    `checkpoint.load_network` needs no data set, and gives the running statistics of the training.

    Args:
      run_dir: a directory that a training wrote.
      which: "student" or "teacher".
      step: as of `evaluate`.
      data_dir: where the data set's files are; the run's own place if "".
      trust: whether networks and data from outside the package, which the run names, are imported.
    Returns:
      `(model, variables)`: `model.apply(variables, images, train=False)` gives `Outputs` for images
      that are normalised as in training, by `data.normalise` with the source's mean and std.
    Raises:
      UserError: if there is no such run, network, step or data set.
    """
    config, splits = _read(run_dir, data_dir=data_dir, split="train", trust=trust)
    model, found = _network(run_dir, config, which, step, splits, trust)
    count = config["eval"]["recalibrate_batches"]
    if count:
        statistics = devices.pmap(evaluation.batch_statistics(model, splits.augmentation))
        networks = {which: (statistics, devices.replicate(found))}
        found = evaluation.recalibrate(networks, splits.train_batches(0, count))[which]
    return model, jax.device_get(found)


def _read(
    run_dir: str,
    data_name: str = "",
    data_dir: str = "",
    batch_size: int = 0,
    split: str = "test",
    trust: bool = False,
) -> tuple[dict, Splits]:
    """The configuration of a run and its data; arguments as of `evaluate`."""
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
    seed, workers = config["seed"], config["workers"]
    return config, Splits(train, judged, split, size, seed, workers, damage)


def _network(
    run_dir: str, config: dict, which: str, step: str | int, splits: Splits, trust: bool
) -> tuple[linen.Module, dict]:
    """A network of a run, which must fit its checkpoint and the images of `splits`."""
    keywords = runs.network_arguments(config, which)
    model = models.build(**keywords) if trust and keywords else None
    model, found = checkpoint.load_network(run_dir, which, step, model)
    wanted = checkpoint.variables(experiment.shapes(model, splits.train.image_shape))
    wanted, flat = (traverse_util.flatten_dict(tree, sep="/") for tree in (wanted, found))
    if wanted.keys() != flat.keys():
        raise names.UserError(
            f"the checkpoint's {which} is of another architecture than the configuration in"
            f" {str(run_dir)!r}: {min(wanted.keys() ^ flat.keys())} is in one of them only; restore"
            " config.json, or the code of a network of your own"
        )
    for key, array in flat.items():
        if array.shape != wanted[key].shape:
            raise names.UserError(
                f"the checkpoint's {which} does not fit images of"
                f" {'x'.join(map(str, splits.train.image_shape))}: {key} is {array.shape} in the"
                f" checkpoint, and would be {wanted[key].shape}; choose a data set whose images"
                " have the shape of those it was trained on"
            )
    return model, found


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
