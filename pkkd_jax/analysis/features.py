"""What networks answer to images, stage by stage, and how alike two of them are."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, traverse_util

from pkkd_jax import checkpoint, distill, metrics, names, runs
from pkkd_jax.analysis.run import Network, Run, load
from pkkd_jax.analysis.similarity import cka, embedding, linear_cka
from pkkd_jax.distill.taps import pair_taps, select_taps
from pkkd_jax.nn import AdderConv, Conv, Outputs


def responses(run: Run, images: np.ndarray) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Responses of both networks at the taps that a loss of the run compares, stage by stage.

    Args:
      run: with PKKD, or another loss that has `stages`, or without; then there is the stage "raw"
        alone, at the taps that PKKD compares by default, or at those of each network where they do
        not pair.
      images: float32 `[n, height, width, channels]`, normalised, such as `examples` returns.
    Returns:
      Stage -> "student" or "teacher" -> the student's name of the tap -> float32 `[n, height',
      width', channels']`. Stages are "raw", "kernel" (where PKKD has one) and "rho".
    """
    outputs = {which: network.outputs(images) for which, network in run.networks.items()}
    found = None
    if "teacher" in outputs:
        for name, (_, loss) in distill.build(run.config["distill"], 1).items():
            if loss.stages is not None and found is None:
                found = loss.stages(
                    run.losses.get(name, {}), outputs["student"], outputs["teacher"]
                )
    if found is None:
        found = {"raw": _raw(outputs)}
    return {
        stage: {
            which: {tap: np.asarray(z) for tap, z in taps.items()} for which, taps in sides.items()
        }
        for stage, sides in found.items()
    }


def _raw(outputs: dict[str, Outputs]) -> dict[str, dict[str, jax.Array]]:
    features = {which: each.features for which, each in outputs.items()}
    if "teacher" in outputs:
        with contextlib.suppress(names.UserError):
            pairs = pair_taps("pkkd", outputs["student"], outputs["teacher"], "auto")
            return {which: {p.name: getattr(p, which) for p in pairs} for which in outputs}
    taps = {which: select_taps(found, "block_ends") for which, found in features.items()}
    return {which: {tap: features[which][tap] for tap in taps[which]} for which in outputs}


def similarities(
    stages: dict[str, dict[str, dict[str, np.ndarray]]],
) -> dict[str, dict[str, float]]:
    """Linear CKA of student and teacher at each tap that they share.

    Args:
      stages: what `responses` returns.
    Returns:
      Stage -> tap -> CKA; no stage where there is no teacher.
    """
    return {
        stage: {
            tap: linear_cka(response, sides["teacher"][tap])
            for tap, response in sides["student"].items()
            if tap in sides["teacher"]
        }
        for stage, sides in stages.items()
        if "teacher" in sides
    }


def penultimate(run: Run, images: np.ndarray, method: str = "pca") -> dict[str, np.ndarray]:
    """The classifier's input in two dimensions, by network; of those that have such a feature.

    Args:
      run: its networks.
      images: float32 `[n, height, width, channels]`, normalised.
      method: see `embedding`.
    Returns:
      "student" and "teacher" -> float64 `[n, 2]`.
    """
    features = {which: network.outputs(images).features for which, network in run.networks.items()}
    return {
        which: embedding(found["penultimate"], method)
        for which, found in features.items()
        if "penultimate" in found
    }


def along(
    run_dir: str | Path, images: np.ndarray, count: int = 4, trust: bool = False
) -> tuple[dict[int, np.ndarray], list[str], list[str]]:
    """Linear CKA of all convolutions' raw responses, student against teacher, along a run.

    Args:
      run_dir: of a training with a teacher; it has as many checkpoints as `config.keep_evaluated`
        let it keep.
      images: float32 `[n, height, width, channels]`, normalised.
      count: of checkpoints, evenly spread from the first to the last.
      trust: as of `load`.
    Returns:
      Step -> CKA `[taps of the student, taps of the teacher]`, and the names of both.
    """
    steps, found = checkpoint.saved_steps(run_dir), {}
    places = np.unique(np.linspace(0, len(steps) - 1, count).round().astype(int))
    for step in (steps[place] for place in places):
        features = {}
        for which, network in load(run_dir, step, trust).networks.items():
            every = network.outputs(images).features
            features[which] = {tap: every[tap] for tap in select_taps(every, "all")}
        found[step] = cka(features["student"], features["teacher"])
    return found, list(features["student"]), list(features["teacher"])


def zero_shares(network: Network, images: np.ndarray) -> dict[str, float]:
    """Share of exactly zero features that each layer with filters is given.

    Args:
      network: any, a user's own too.
      images: float32 `[n, height, width, channels]`, normalised.
    Returns:
      Layer (its path in the parameters, with "/") -> fraction; the first layer's are the images.
    """
    return _by_layer(network, images, lambda module, given, response: (given == 0).mean())


def linear_shares(network: Network, images: np.ndarray) -> dict[str, float]:
    """How far each adder layer is a convolution with the signs of its filters.

    Where a filter's value is further from zero than the input, |x - w| = |w| - sign(w) x: a layer
    of such filters adds and subtracts its inputs, as a network with binary weights does.

    Args:
      network: any, a user's own too.
      images: float32 `[n, height, width, channels]`, normalised.
    Returns:
      Layer (its path in the parameters, with "/") -> squared correlation of its responses, over
      images and places, with those of the convolution; mean over the filters. `{}` for a network
      without `pkkd_jax.nn.AdderConv`.
    """

    def measure(module, given, response):
        if not isinstance(module, AdderConv):
            return None
        signs = jnp.sign(module.get_variable("params", "filters"))
        fields = ("strides", "padding", "kernel_dilation", "feature_group_count")
        same = {field: getattr(module, field) for field in fields}
        convolution = Conv(module.features, signs.shape[:2], use_bias=False, parent=None, **same)
        linear = convolution.apply({"params": {"kernel": signs}}, given)
        a, b = (z.reshape(-1, z.shape[-1]) for z in (response, linear))
        a, b = a - a.mean(0), b - b.mean(0)
        return jnp.nanmean((a * b).sum(0) ** 2 / ((a * a).sum(0) * (b * b).sum(0)))

    return _by_layer(network, images, measure)


def _by_layer(
    network: Network, images: np.ndarray, measure: Callable[..., jax.Array | None]
) -> dict[str, float]:
    """What `measure(module, given, response)` says of the layers with filters, in forward order.

    Layers of which it says None are left out; of one that is called several times it is the mean.
    """
    order: dict[str, None] = {}

    def note(next_function, args, kwargs, context):
        result, module = next_function(*args, **kwargs), context.module
        own = module.variables.get("params", {}) if context.method_name == "__call__" else {}
        if {"filters", "kernel"} & set(own):
            value = measure(module, next(iter((*args, *kwargs.values()))), result)
            if value is not None:
                module.sow("measured", "value", value)
                order["/".join(module.path)] = None
        return result

    with linen.intercept_methods(note):
        sown = network.apply(images, ["measured"])[1].get("measured", {})
    flat = traverse_util.flatten_dict(sown, sep="/")
    values = {path.removesuffix("/value"): np.mean(value) for path, value in flat.items()}
    return {layer: float(values[layer]) for layer in order if layer in values}


def sigma_history(run_dir: str | Path) -> dict[str, dict[str, np.ndarray]]:
    """How the sigmas of PKKD's kernels moved in training.

    Returns:
      Tap -> {"step": int `[k]`, "student": float `[k]`, "teacher": float `[k]`}; `{}` for a run
      without kernels.
    Raises:
      UserError: if there is no such run.
    """
    runs.read_config(run_dir)  # refuses what is no run
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
