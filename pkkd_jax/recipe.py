"""What is trained, by what losses and optimisers, and its state before the first step."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen

from pkkd_jax import data
from pkkd_jax.distill import Distiller
from pkkd_jax.nn import Outputs
from pkkd_jax.state import DistillState, NetworkState


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that an update depends on besides state and batch.

    Attributes:
      student: the Linen module, with `bn_axis_name=None`.
      teacher: likewise; None trains the student alone.
      teacher_learns: True trains the teacher in the same step (progressive); False keeps it as it
        is, in evaluation mode (fixed).
      losses: name -> (weight or its schedule over steps, Distiller).
      alpha: weight of the student's cross-entropy with the labels.
      optimiser: of student and teacher.
      distiller_optimiser: of what the losses learn.
      augmentation: keywords of `data.augment`: augmentation, mean, std.
      seed: of augmentation and dropout.
      label_smoothing: share of the label spread over all classes, in both networks' cross-entropy.
      snapshots: steps after which the teacher becomes a copy of the student, ascending; the losses
        begin after the first of them. With a schedule whose cycles end there, a student learns from
        itself at the end of the cycle before (Yang et al., Snapshot Distillation, CVPR 2019, who
        smooth what the teacher says: KD's temperature).
    """

    student: linen.Module
    teacher: linen.Module | None
    teacher_learns: bool
    losses: Mapping[str, tuple[float | optax.Schedule, Distiller]]
    alpha: float
    optimiser: optax.GradientTransformation
    distiller_optimiser: optax.GradientTransformation
    augmentation: Mapping[str, Any]
    seed: int
    label_smoothing: float = 0.0
    snapshots: tuple[int, ...] = ()


def hyperparameters(recipe: Recipe) -> dict:
    """What an update takes of `recipe` when it runs, and is not compiled for.

    Recipes that differ in nothing else share one compiled program: "key" of the seed, "alpha", and
    "weights" of the losses whose weight is no schedule.
    """
    plain = {name: w for name, (w, _) in recipe.losses.items() if not callable(w)}
    numbers = jax.tree.map(jnp.float32, {"alpha": recipe.alpha, "weights": plain})
    return {"key": jax.random.key_data(jax.random.key(recipe.seed)), **numbers}


def init_network(model: linen.Module, key: jax.Array, image_shape: tuple[int, ...]) -> dict:
    """Fresh variables of `model` for images of `[height, width, channels]`."""
    images = jnp.zeros((1, *image_shape))
    return jax.jit(partial(model.init, train=False))({"params": key}, images)


def init_state(
    recipe: Recipe, images: np.ndarray, teacher_variables: dict | None = None
) -> DistillState:
    """Fresh networks, and losses started from `images`.

    Args:
      recipe: what is trained.
      images: uint8 `[n, height, width, channels]`, the first training examples, of which the
        losses take their starting values.
      teacher_variables: of a fixed teacher.
    """
    student_key, teacher_key, losses_key, dropout_key = jax.random.split(
        jax.random.key(recipe.seed), 4
    )
    plain = data.normalise(
        jnp.asarray(images), recipe.augmentation["mean"], recipe.augmentation["std"]
    )

    def network(variables, learns=True):
        params = variables["params"]
        opt_state = recipe.optimiser.init(params) if learns else ()
        return NetworkState(params, variables.get("batch_stats", {}), opt_state)

    student = network(init_network(recipe.student, student_key, images.shape[1:]))
    teacher, params = None, {}
    if recipe.teacher is not None:
        # Of snapshots the losses' start must know only what kind of responses they will be.
        key, learns = teacher_key, recipe.teacher_learns or bool(recipe.snapshots)
        fresh = teacher_variables or init_network(recipe.teacher, key, images.shape[1:])
        teacher = network(fresh, recipe.teacher_learns)

        @jax.jit
        def init_losses(student_variables, teacher_variables, plain, losses_key, dropout_key):
            outputs = forward(recipe.student, student_variables, plain, True, dropout_key)[0]
            targets = forward(recipe.teacher, teacher_variables, plain, learns, dropout_key)[0]
            keys = jax.random.split(losses_key, len(recipe.losses) + 1)
            params = {
                name: loss.init(key, outputs, targets)
                for key, (name, (_, loss)) in zip(keys, recipe.losses.items(), strict=False)
            }
            for name, (_, loss) in recipe.losses.items():
                loss.apply(params[name], outputs, targets, None)  # refuses taps that do not fit
            return params

        params = init_losses(student.variables, teacher.variables, plain, losses_key, dropout_key)
    distiller = NetworkState(params, {}, recipe.distiller_optimiser.init(params))
    return DistillState(np.int32(0), student, teacher, distiller)


def forward(model, variables, images, train, dropout_key) -> tuple[Outputs, Any]:
    """Outputs and new batch statistics; the old ones in evaluation mode."""
    if not train:
        return model.apply(variables, images, train=False), variables["batch_stats"]
    outputs, updated = model.apply(
        variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": dropout_key}
    )
    return outputs, updated.get("batch_stats", {})
