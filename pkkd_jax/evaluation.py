"""Accuracy on unseen images, with BatchNorm's running statistics and with recalibrated ones."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen
from jax import lax

from pkkd_jax import data, devices
from pkkd_jax.devices import AXIS
from pkkd_jax.experiment import Splits
from pkkd_jax.recipe import forward
from pkkd_jax.update import synchronised


def evaluate_networks(
    networks: dict[str, Any],
    variables: dict[str, dict],
    splits: Splits,
    recalibrate_batches: int,
    mapped: dict,
    between: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Figures of networks on unseen images, with recalibrated and running BatchNorm statistics.

    Args:
      networks: name to model.
      variables: name to variables, on the devices; they stay as they are.
      splits: the data.
      recalibrate_batches: training batches for the statistics; 0 keeps the running ones.
      mapped: compiled functions by name, kept from call to call; `{}` at first.
      between: called before each batch; may raise to stop the evaluation.
    Returns:
      `<splits.judge>/<network>/{accuracy,top5,loss}`, and the same with `_uncalibrated`.
    """
    mean, std = splits.train.mean, splits.train.std
    for name, model in networks.items():
        if name not in mapped:
            mapped[name] = (
                devices.pmap(sums(model, mean, std)),
                devices.pmap(batch_statistics(model, splits.augmentation)),
            )

    def watched(batches):
        for batch in batches:
            between()
            yield batch

    calibrated = (
        recalibrate(
            {name: (mapped[name][1], variables[name]) for name in networks},
            watched(splits.train_batches(0, recalibrate_batches)),
        )
        if recalibrate_batches
        else {}
    )
    evaluations = {
        **{f"{name}/uncalibrated": (mapped[name][0], variables[name]) for name in networks},
        **{name: (mapped[name][0], calibrated[name]) for name in calibrated},
    }
    found = evaluate(evaluations, watched(splits.test_batches()))
    figures = {}
    for name in networks:
        raw = found[f"{name}/uncalibrated"]
        path = f"{splits.judge}/{name}"
        figures |= {f"{path}/{key}": value for key, value in found.get(name, raw).items()}
        figures |= {f"{path}/{key}_uncalibrated": value for key, value in raw.items()}
    return figures


def sums(model: linen.Module, mean, std) -> Callable:
    """Makes `(variables, batch) -> sums` over the examples whose `mask` is 1, for `pmap`.

    The sums are "count", "correct", "top5" (the label is among the five, or all, best) and "loss".
    """

    def evaluate(variables, batch):
        logits = model.apply(
            variables, data.normalise(batch["image"], mean, std), train=False
        ).logits
        labels, mask = batch["label"], batch["mask"]
        best = lax.top_k(logits, min(5, logits.shape[-1]))[1]
        figures = {
            "count": jnp.ones_like(mask),
            "correct": logits.argmax(-1) == labels,
            "top5": (best == labels[:, None]).any(-1),
            "loss": optax.softmax_cross_entropy_with_integer_labels(logits, labels),
        }
        return lax.psum({key: (mask * value).sum() for key, value in figures.items()}, AXIS)

    return evaluate


def evaluate(
    evaluations: Mapping[str, tuple[Callable, Any]], batches: Iterable
) -> dict[str, dict[str, float]]:
    """Accuracy, top-5 accuracy and loss over `batches`, in one pass for all networks.

    Args:
      evaluations: name to mapped `sums` and the variables for it.
      batches: each example once.
    Returns:
      Name to "accuracy", "top5" and "loss".
    """
    totals: dict[str, dict[str, float]] = {name: {} for name in evaluations}
    for batch in batches:
        for name, (mapped, variables) in evaluations.items():
            for key, value in jax.device_get(mapped(variables, batch)).items():
                totals[name][key] = totals[name].get(key, 0.0) + float(value)
    return {
        name: {
            "accuracy": total["correct"] / total["count"],
            "top5": total["top5"] / total["count"],
            "loss": total["loss"] / total["count"],
        }
        for name, total in totals.items()
    }


def batch_statistics(model: linen.Module, augmentation: Mapping[str, Any]) -> Callable:
    """Makes `(variables, batch) -> BatchNorm statistics of that batch alone`, for `pmap`.

    `batch` is a training batch with a leading axis of micro-batches, of which the first is used.
    Images are augmented as in training: without, ResNet-20 lost two points on CIFAR-10.
    """
    model = synchronised(model)

    def without_memory(next_function, args, kwargs, context):
        if isinstance(context.module, linen.BatchNorm):
            # Frozen, but bound for this call only: momentum 0 leaves the batch's own statistics.
            object.__setattr__(context.module, "momentum", 0.0)
        return next_function(*args, **kwargs)

    def statistics(variables, batch):
        images, key = batch["image"][0], jax.random.key(0)
        positions = lax.axis_index(AXIS) * images.shape[0] + jnp.arange(images.shape[0])
        images = data.augment(key, images, positions, **augmentation)
        with linen.intercept_methods(without_memory):
            _, stats = forward(model, variables, images, True, key)
        return lax.pmean(stats, AXIS)

    return statistics


def recalibrate(
    statistics: Mapping[str, tuple[Callable, dict]], batches: Iterable
) -> dict[str, dict]:
    """Replaces the running statistics of BatchNorm by those of `batches`; parameters stay.

        mean = E[mean_b],   var = E[var_b + mean_b^2] - mean^2

    Args:
      statistics: name to a mapped `batch_statistics` and the network's variables.
      batches: training batches, all of one size, of which one pass is made.
    Returns:
      Name to new variables; the old ones where there is no BatchNorm.
    References:
      Wu and Johnson, Rethinking "Batch" in BatchNorm, 2021, section 3 (precise statistics).
    """
    found: dict[str, list] = {name: [] for name, (_, v) in statistics.items() if v["batch_stats"]}
    for batch in batches:
        for name, each in found.items():
            mapped, variables = statistics[name]
            each.append(jax.device_get(mapped(variables, batch)))

    def pool(*layers):
        if not isinstance(layers[0], Mapping):
            return np.mean(layers, 0, dtype=np.float64).astype(np.float32)
        if set(layers[0]) != {"mean", "var"}:
            return {key: pool(*(layer[key] for layer in layers)) for key in layers[0]}
        means = np.stack([layer["mean"] for layer in layers]).astype(np.float64)
        variances = np.stack([layer["var"] for layer in layers]).astype(np.float64)
        mean = means.mean(0)
        variance = (variances + means**2).mean(0) - mean**2
        return {"mean": mean.astype(np.float32), "var": variance.astype(np.float32)}

    return {
        name: variables
        if name not in found
        else {"params": variables["params"], "batch_stats": devices.replicate(pool(*found[name]))}
        for name, (_, variables) in statistics.items()
    }
