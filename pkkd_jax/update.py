"""The joint update of teacher and student, to be mapped over devices by `devices.pmap`."""

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen
from jax import lax

from pkkd_jax import data
from pkkd_jax.devices import AXIS
from pkkd_jax.recipe import Recipe, forward
from pkkd_jax.state import DistillState, NetworkState


def synchronised(model: linen.Module) -> linen.Module:
    """`model` with its BatchNorm over all devices, to be called inside `pmap`."""
    return model.clone(bn_axis_name=AXIS)


def _weights(recipe: Recipe, given: dict, step) -> dict[str, Any]:
    """The losses' weights in the update after `step`."""
    weights = {
        name: weight(step) if callable(weight) else given["weights"][name]
        for name, (weight, _) in recipe.losses.items()
    }
    if recipe.snapshots:
        begun = step >= recipe.snapshots[0]
        weights = {name: jnp.where(begun, weight, 0.0) for name, weight in weights.items()}
    return weights


def loss_terms(recipe: Recipe) -> Callable:
    """Makes `(params, stats, step, images, labels, key, given) -> (terms, (new stats, metrics))`.

    The terms are "teacher", "ce" and the losses' names to their weighted values, whose sum is what
    an update goes down; `given` are `hyperparameters`. It works on one device's examples, inside
    `pmap`.
    """
    student_model = synchronised(recipe.student)
    teacher_model = None
    if recipe.teacher is not None:
        teacher_model = synchronised(recipe.teacher) if recipe.teacher_learns else recipe.teacher

    def cross_entropy(logits, labels):
        targets = jax.nn.one_hot(labels, logits.shape[-1])
        targets = optax.smooth_labels(targets, recipe.label_smoothing)
        return optax.softmax_cross_entropy(logits, targets).mean()

    def accuracy(logits, labels):
        return (logits.argmax(-1) == labels).mean()

    def terms(params, stats, step, images, labels, key, given):
        metrics, new_stats, found, targets = {}, {}, {}, None
        if teacher_model is not None:
            variables = {"params": params["teacher"], "batch_stats": stats["teacher"]}
            targets, new_stats["teacher"] = forward(
                teacher_model, variables, images, recipe.teacher_learns, key
            )
            ce = cross_entropy(targets.logits, labels)
            found["teacher"] = ce
            metrics |= {"teacher/loss": ce, "teacher/accuracy": accuracy(targets.logits, labels)}
            targets = lax.stop_gradient(targets)
        variables = {"params": params["student"], "batch_stats": stats["student"]}
        outputs, new_stats["student"] = forward(student_model, variables, images, True, key)
        ce = cross_entropy(outputs.logits, labels)
        found["ce"] = given["alpha"] * ce
        metrics |= {"student/loss_ce": ce, "student/accuracy": accuracy(outputs.logits, labels)}
        weights = _weights(recipe, given, step)
        for name, (_, distiller) in recipe.losses.items():
            value, figures = distiller.apply(params["distiller"][name], outputs, targets, AXIS)
            found[name] = weights[name] * value
            metrics |= {f"student/{key}": figure for key, figure in figures.items()}
        metrics["student/loss"] = sum(value for name, value in found.items() if name != "teacher")
        return found, (new_stats, metrics)

    return terms


def prepare(recipe: Recipe, given: dict, step, index, images):
    """The augmented images of one micro-batch, and the key of its dropout."""
    start = (index * lax.axis_size(AXIS) + lax.axis_index(AXIS)) * images.shape[0]
    positions = start + jnp.arange(images.shape[0])
    augment_key, dropout_key = jax.random.split(
        jax.random.fold_in(jax.random.wrap_key_data(given["key"]), step)
    )
    images = data.augment(augment_key, images, positions, **recipe.augmentation)
    return images, jax.random.fold_in(dropout_key, start)


def trees(state: DistillState) -> tuple[dict, dict]:
    """Parameters and batch statistics by network."""
    networks = {"student": state.student}
    if state.teacher is not None:
        networks["teacher"] = state.teacher
    params = {name: network.params for name, network in networks.items()}
    params["distiller"] = state.distiller.params
    return params, {name: network.batch_stats for name, network in networks.items()}


def joint_update(recipe: Recipe) -> Callable:
    """Makes `(state, batch, hyperparameters) -> (state, metrics)`, to be mapped by `pmap`.

        teacher loss = CE(teacher, label)
        student loss = alpha * CE(student, label) + sum_i weight_i * loss_i(student, teacher)

    `batch` holds "image" uint8 `[k, b, height, width, channels]` and "label" int32 `[k, b]`: the k
    micro-batches of this device, whose gradients are averaged before the one step they make. The
    teacher's outputs are constants for the student. What a loss learns goes down that loss itself:
    its weight says how much it means to the student, not how fast it learns. Where a loss or
    anything new is not finite, the metric "finite" is False, and the state but for its step stays
    as it was.
    """
    terms = loss_terms(recipe)

    def loss(*arguments):
        found, auxiliary = terms(*arguments)
        return sum(found.values()), auxiliary

    def micro_batch(params, stats, given, step, index, images, labels):
        images, key = prepare(recipe, given, step, index, images)
        return jax.grad(loss, has_aux=True)(params, stats, step, images, labels, key, given)

    def learn(optimiser, network: NetworkState, gradient, batch_stats) -> NetworkState:
        updates, opt_state = optimiser.update(gradient, network.opt_state, network.params)
        return NetworkState(optax.apply_updates(network.params, updates), batch_stats, opt_state)

    def update(state: DistillState, batch, given: dict):
        params, stats = trees(state)
        count = batch["label"].shape[0]
        if count == 1:
            gradients, (stats, metrics) = micro_batch(
                params, stats, given, state.step, 0, batch["image"][0], batch["label"][0]
            )
        else:

            def body(stats, item):
                gradients, (stats, metrics) = micro_batch(params, stats, given, state.step, *item)
                return stats, (gradients, metrics)

            def summed(carry, item):
                stats, total = carry
                stats, new = body(stats, item)
                return (stats, jax.tree.map(jnp.add, total, new)), None

            items = (jnp.arange(count), batch["image"], batch["label"])
            first = jax.tree.map(lambda a: a[0], items)
            zeros = jax.tree.map(
                lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(body, stats, first)[1]
            )
            (stats, total), _ = lax.scan(summed, (stats, zeros), items)
            gradients, metrics = jax.tree.map(lambda a: a / count, total)
        gradients, stats, metrics = lax.pmean((gradients, stats, metrics), AXIS)
        student = learn(recipe.optimiser, state.student, gradients["student"], stats["student"])
        teacher = state.teacher
        if recipe.teacher_learns and teacher is not None:
            teacher = learn(recipe.optimiser, teacher, gradients["teacher"], stats["teacher"])
        weights = _weights(recipe, given, state.step)

        def unweighted(name, tree):
            weight = weights.get(name, 1.0)
            return jax.tree.map(lambda g: g / jnp.where(weight == 0, 1.0, weight), tree)

        learnt = {name: unweighted(name, tree) for name, tree in gradients["distiller"].items()}
        distiller = learn(recipe.distiller_optimiser, state.distiller, learnt, {})
        new = DistillState(state.step, student, teacher, distiller)
        finite = all_finite((new, metrics))
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        if recipe.snapshots:
            now = jnp.isin(state.step + 1, jnp.array(recipe.snapshots))
            copied = jax.tree.map(
                lambda new, old: jnp.where(now, new, old),
                new.student.variables,
                new.teacher.variables,
            )
            new = new.replace(teacher=new.teacher.replace(**copied))
        return new.replace(step=state.step + 1), {**metrics, "finite": finite}

    return update


def all_finite(tree) -> jax.Array:
    """Whether every float in `tree` is finite."""
    alike = collections.defaultdict(list)  # looked at together: a GPU has less to start
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            alike[leaf.shape, leaf.dtype].append(leaf)
    return jnp.array([jnp.isfinite(jnp.stack(leaves)).all() for leaves in alike.values()]).all()
