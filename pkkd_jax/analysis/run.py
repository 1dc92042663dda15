"""A run directory, or a training under way, as what the rest of this package looks at."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen

from pkkd_jax import checkpoint, data, distill, experiment, metrics, models, names, runs, update
from pkkd_jax.distill.taps import pair_taps, select_taps
from pkkd_jax.nn import Outputs
from pkkd_jax.state import DistillState


@dataclasses.dataclass(frozen=True)
class Network:
    """A network with its variables.

    Attributes:
      model: the Linen module.
      variables: for `model.apply`.
      learns: whether BatchNorm uses the statistics of the batch, as in its training.
    """

    model: linen.Module
    variables: dict[str, Any]
    learns: bool = True

    def outputs(self, images: np.ndarray) -> Outputs:
        """Logits and all features, as the training sees them: a fixed teacher's, and no other's,
        BatchNorm has running statistics.

        Args:
          images: float32 `[n, height, width, channels]`, normalised.
        """
        return update.forward(self.model, self.variables, images, self.learns, jax.random.key(0))[0]


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
        remedy = "trust=True, at a command line --trust, imports it"
        runs.refuse_outside(run_dir, config, ("student", "teacher", "distill"), remedy)
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
    run: Run, count: int, split: str = "test", data_dir: str = "", trust: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Examples of the run's data set, the same ones always, normalised as for its networks.

    Args:
      run: whose data set.
      count: how many; all of the split where it has fewer.
      split: "test", "train" (not augmented), or "validation" where the run held some out.
      data_dir: where the data set's files are; the run's own place if "".
      trust: whether a data set from outside the package is imported.
    Returns:
      float32 images `[n, height, width, channels]` and int32 labels `[n]`.
    Raises:
      UserError: if the data set is not there.
    """
    arguments = dict(run.config["data"])
    if count < 1:
        raise names.UserError(f"{count=} images: it must be 1 or more")
    if "." in arguments["name"] and not trust:
        raise names.UserError(
            f"data set {arguments['name']!r} is from outside the package: trust=True, at a command"
            " line --trust, imports it"
        )
    if data_dir:
        arguments["data_dir"] = data_dir
    damage = data.Damage(run.config["max_damaged"])
    source = data.build_source(split, damage, **arguments)
    return normalised(source, count, damage)


def normalised(
    source: data.Source, count: int, damage: data.Damage
) -> tuple[np.ndarray, np.ndarray]:
    """`count` examples of `source`, the same ones always, as `examples` returns them."""
    count = min(count, len(source))
    chosen = np.sort(np.random.default_rng(0).permutation(len(source))[:count])
    images, labels = data.take(source, chosen, damage)
    return np.asarray(data.normalise(images, source.mean, source.std)), labels


def responses(run: Run, images: np.ndarray) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Responses of both networks at the taps that the run's PKKD compares, stage by stage.

    Args:
      run: with PKKD or without; then there is the stage "raw" alone, at the taps that PKKD compares
        by default.
      images: float32 `[n, height, width, channels]`, normalised, such as `examples` returns.
    Returns:
      Stage -> "student" or "teacher" -> the student's name of the tap -> float32 `[n, height',
      width', channels']`. Stages are "raw", "kernel" (where PKKD has one) and "rho".
    """
    outputs = {which: network.outputs(images) for which, network in run.networks.items()}
    if "pkkd" in run.losses:
        settings = {"pkkd": run.config["distill"]["pkkd"]}
        loss = distill.build(settings, 1)["pkkd"][1]
        found = loss.stages(run.losses["pkkd"], outputs["student"], outputs["teacher"])
    elif "teacher" in outputs:
        pairs = pair_taps("pkkd", outputs["student"], outputs["teacher"], "auto")
        found = {
            "raw": {
                "student": {pair.name: pair.student for pair in pairs},
                "teacher": {pair.name: pair.teacher for pair in pairs},
            }
        }
    else:
        features = outputs["student"].features
        taps = select_taps(features, "block_ends")
        found = {"raw": {"student": {tap: features[tap] for tap in taps}}}
    return {
        stage: {
            which: {tap: np.asarray(z) for tap, z in taps.items()} for which, taps in sides.items()
        }
        for stage, sides in found.items()
    }


def zero_shares(network: Network, images: np.ndarray) -> dict[str, float]:
    """Share of exactly zero features that each layer with filters is given.

    Args:
      network: any, a user's own too.
      images: float32 `[n, height, width, channels]`, normalised.
    Returns:
      Layer (its path in the parameters, with "/") -> fraction; the first layer's are the images.
    """
    found: dict[str, jax.Array] = {}

    def note(next_function, args, kwargs, context):
        result = next_function(*args, **kwargs)
        module = context.module
        own = module.variables.get("params", {}) if context.method_name == "__call__" else {}
        if {"filters", "kernel"} & set(own):
            found["/".join(module.path)] = (args[0] == 0).mean()
        return result

    with linen.intercept_methods(note):
        network.outputs(images)
    return {layer: float(share) for layer, share in found.items()}


def sigma_history(run_dir: str | Path) -> dict[str, dict[str, np.ndarray]]:
    """How the sigmas of PKKD's kernels moved in training.

    Returns:
      Tap -> {"step": int `[k]`, "student": float `[k]`, "teacher": float `[k]`}; `{}` for a run
      without kernels.
    """
    rows = metrics.read(Path(run_dir))
    found: dict[str, dict[str, np.ndarray]] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        prefix, _, tap = key.rpartition("/")
        if prefix == "train/student/sigma_student":
            kept = [row for row in rows if key in row]
            other = f"train/student/sigma_teacher/{tap}"
            found[tap] = {
                "step": np.array([row["step"] for row in kept]),
                "student": np.array([row[key] for row in kept]),
                "teacher": np.array([row[other] for row in kept]),
            }
    return found
