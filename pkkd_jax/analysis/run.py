"""A run directory, or a training under way, as what the rest of this package looks at."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen

from pkkd_jax import checkpoint, data, experiment, models, names, runs
from pkkd_jax.nn import Outputs
from pkkd_jax.state import DistillState

REMEDY = "trust=True, at a command line --trust, imports it"  # what is from outside the package


@dataclasses.dataclass(frozen=True)
class Network:
    """A network with its variables.

    Attributes:
      model: the Linen module.
      variables: for `model.apply`.
      learns: whether BatchNorm uses the statistics of the batch, as in training; a fixed teacher's
        has running ones.
    """

    model: linen.Module
    variables: dict[str, Any]
    learns: bool = True

    def outputs(self, images: np.ndarray) -> Outputs:
        """Logits and all features, without dropout; BatchNorm as `learns` says.

        Args:
          images: float32 `[n, height, width, channels]`, normalised.
        """
        return self.apply(images, [])[0]

    def apply(self, images: np.ndarray, collections: list[str]) -> tuple[Outputs, dict[str, Any]]:
        """The same, and what modules have put into Flax's `collections`."""

        def without_dropout(next_function, args, kwargs, context):
            if isinstance(context.module, linen.Dropout):
                return next(iter((*args, *kwargs.values())))
            return next_function(*args, **kwargs)

        with linen.intercept_methods(without_dropout):
            return self.model.apply(
                self.variables,
                images,
                train=self.learns,
                mutable=[*collections, *(["batch_stats"] if self.learns else [])],
                rngs={"dropout": jax.random.key(0)},
            )


@dataclasses.dataclass(frozen=True)
class Run:
    """What a training has made so far.

    Attributes:
      config: the configuration.
      step: of the parameters.
      networks: "student", and "teacher" where there is one, to `Network`.
      losses: what each loss has learnt, by name.
    """

    config: dict
    step: int
    networks: dict[str, Network]
    losses: dict[str, Any]


def load(run_dir: str | Path, step: str | int = "last", trust: bool = False) -> Run:
    """Loads a run directory; the data set is not needed.

    Args:
      run_dir: a directory that a training wrote.
      step: "last", "best" (by accuracy of the student on unseen images) or a saved step.
      trust: whether networks and losses from outside the package, which the run names, are
        imported.
    Raises:
      UserError: if there is no such run or step; the message says what there is.
    """
    config = runs.read_config(run_dir)
    if not trust:
        runs.refuse_outside(run_dir, config, ("student", "teacher", "distill"), REMEDY)
    step, parts = checkpoint.load_parts(run_dir, step)
    networks = {}
    for which in ("student", "teacher"):
        arguments = runs.network_arguments(config, which)
        if arguments is not None:
            learns = which == "student" or config["teacher"]["mode"] == "progressive"
            variables = checkpoint.variables(parts[which])
            networks[which] = Network(models.build(**arguments), variables, learns)
    return Run(config, step, networks, parts["distiller"].get("params", {}))


def of_state(built: experiment.Experiment, state: DistillState) -> Run:
    """A training as it stands at `state`."""
    recipe, networks = built.recipe, {}
    for which, learns in (("student", True), ("teacher", recipe.teacher_learns)):
        network = getattr(state, which)
        if network is not None:
            networks[which] = Network(getattr(recipe, which), network.variables, learns)
    return Run(built.config, int(state.step), networks, state.distiller.params)


def examples(
    run: Run, count: int = 0, split: str = "test", data_dir: str = "", trust: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Examples of the run's data set, the same ones always, normalised as for its networks.

    Args:
      run: whose data set.
      count: how many, or all of the split where it has fewer; 0 for 256, or for fewer where images
        are large.
      split: "test", "train" (not augmented), or "validation" where the run held some out.
      data_dir: where the data set's files are; the run's own place if "".
      trust: whether a data set from outside the package is imported.
    Returns:
      float32 images `[n, height, width, channels]` and int32 labels `[n]`.
    Raises:
      UserError: if the data set is not there.
    """
    arguments = dict(run.config["data"])
    if count < 0:
        raise names.UserError(f"{count=} images: it must be 0 (chosen by their size) or more")
    if not trust:
        runs.refuse_outside("the run", run.config, ["data"], REMEDY)
    if data_dir:
        arguments["data_dir"] = data_dir
    damage = data.Damage(run.config["max_damaged"])
    source = data.build_source(split, damage, **arguments)
    return normalised(source, count, damage)


def normalised(
    source: data.Source, count: int, damage: data.Damage
) -> tuple[np.ndarray, np.ndarray]:
    """`count` examples of `source`, the same ones always, as `examples` returns them."""
    fitting = min(256, max(16, 2**22 // math.prod(source.image_shape)))
    count = min(count or fitting, len(source))
    chosen = np.sort(np.random.default_rng(0).permutation(len(source))[:count])
    images, labels = data.take(source, chosen, damage)
    return np.asarray(data.normalise(images, source.mean, source.std)), labels
