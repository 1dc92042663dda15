"""The joint update of teacher and student, evaluation and recalibration: all that is mapped."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, traverse_util
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pkkd_jax import data
from pkkd_jax.distill import Distiller
from pkkd_jax.nn import Outputs
from pkkd_jax.state import DistillState, NetworkState

AXIS = "batch"


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
        begin after the first of them (snapshot distillation).
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


def pmap(function: Callable, *constants: Any, donate: bool = False) -> Callable:
    """Maps `function(state, batch, *constants)` over the devices: makes `(state, batch) -> tree`.

    `batch` is split, the rest is not; `constants` are the same trees at every call. Results
    must be equal on every device: they come back without a leading device axis.
    """
    mapped = jax.pmap(
        function,
        axis_name=AXIS,
        in_axes=(None, 0, *(None for _ in constants)),
        out_axes=None,
        donate_argnums=(0,) if donate else (),
    )
    constants = replicate(constants)
    return lambda state, batch: mapped(state, batch, *constants)


def replicate(tree: Any) -> Any:
    """Puts `tree` on every device of this process, so that the first step compiles for all."""
    sharding = NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS,)), PartitionSpec())
    return jax.tree.map(lambda a: jax.device_put(a, sharding), tree)


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
            outputs = _forward(recipe.student, student_variables, plain, True, dropout_key)[0]
            targets = _forward(recipe.teacher, teacher_variables, plain, learns, dropout_key)[0]
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


def _forward(model, variables, images, train, dropout_key) -> tuple[Outputs, Any]:
    """Outputs and new batch statistics; the old ones in evaluation mode."""
    if not train:
        return model.apply(variables, images, train=False), variables["batch_stats"]
    outputs, updated = model.apply(
        variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": dropout_key}
    )
    return outputs, updated.get("batch_stats", {})


def _synchronised(model: linen.Module) -> linen.Module:
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


def _terms(recipe: Recipe) -> Callable:
    """Makes `(params, stats, step, images, labels, key, given) -> (terms, (new stats, metrics))`.

    The terms are "teacher", "ce" and the losses' names to their weighted values, whose sum is what
    an update goes down; `given` are `hyperparameters`. It works on one device's examples, inside
    `pmap`.
    """
    student_model = _synchronised(recipe.student)
    teacher_model = None
    if recipe.teacher is not None:
        teacher_model = _synchronised(recipe.teacher) if recipe.teacher_learns else recipe.teacher

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
            targets, new_stats["teacher"] = _forward(
                teacher_model, variables, images, recipe.teacher_learns, key
            )
            ce = cross_entropy(targets.logits, labels)
            found["teacher"] = ce
            metrics |= {"teacher/loss": ce, "teacher/accuracy": accuracy(targets.logits, labels)}
            targets = lax.stop_gradient(targets)
        variables = {"params": params["student"], "batch_stats": stats["student"]}
        outputs, new_stats["student"] = _forward(student_model, variables, images, True, key)
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


def _prepared(recipe: Recipe, given: dict, step, index, images):
    """The augmented images of one micro-batch, and the key of its dropout."""
    start = (index * lax.axis_size(AXIS) + lax.axis_index(AXIS)) * images.shape[0]
    positions = start + jnp.arange(images.shape[0])
    augment_key, dropout_key = jax.random.split(
        jax.random.fold_in(jax.random.wrap_key_data(given["key"]), step)
    )
    images = data.augment(augment_key, images, positions, **recipe.augmentation)
    return images, jax.random.fold_in(dropout_key, start)


def _trees(state: DistillState) -> tuple[dict, dict]:
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
    terms = _terms(recipe)

    def loss(*arguments):
        found, auxiliary = terms(*arguments)
        return sum(found.values()), auxiliary

    def micro_batch(params, stats, given, step, index, images, labels):
        images, key = _prepared(recipe, given, step, index, images)
        return jax.grad(loss, has_aux=True)(params, stats, step, images, labels, key, given)

    def learn(optimiser, network: NetworkState, gradient, batch_stats) -> NetworkState:
        updates, opt_state = optimiser.update(gradient, network.opt_state, network.params)
        return NetworkState(optax.apply_updates(network.params, updates), batch_stats, opt_state)

    def update(state: DistillState, batch, given: dict):
        params, stats = _trees(state)
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
        finite = _finite((new, metrics))
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


def _finite(tree) -> jax.Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.array([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def largest(state, wishes):
    """The largest of all devices' `wishes`, to be mapped by `pmap`; there is no `state`."""
    del state
    return lax.pmax(wishes, AXIS)


def first_not_finite(recipe: Recipe, state: DistillState, batch) -> str:
    """What is not finite first in the update of `state` by `batch`, in words.

    Responses of the teacher's and then of the student's layers are looked at in the order of the
    forward pass, then the losses, then gradients in the order of the backward pass.
    """
    terms = _terms(recipe)
    texts: list[str] = []

    def look(state, batch, given):
        params, stats = _trees(state)
        found: dict[str, jax.Array] = {}

        def note(text, tree):
            found[text] = found.get(text, True) & _finite(tree)

        for index in range(batch["label"].shape[0]):
            images, key = _prepared(recipe, given, state.step, index, batch["image"][index])
            layers: list[str] = []
            for name in ("teacher", "student"):
                model, train = getattr(recipe, name), name == "student" or recipe.teacher_learns
                if model is None:
                    continue
                variables = {"params": params[name], "batch_stats": stats[name]}
                model = _synchronised(model) if train else model
                outputs, _ = _forward(model, variables, images, train, key)
                layers = list(outputs.features)
                for tap, response in outputs.features.items():
                    note(f"the {name}'s response of {tap} is", response)
                note(f"the {name}'s logits are", outputs.logits)
            arguments = stats, state.step, images, batch["label"][index], key, given
            values, _ = terms(params, *arguments)
            for name, value in values.items():
                which = "the teacher's loss" if name == "teacher" else f"the student's loss {name}"
                note(f"{which} is", value)
            gradients = jax.grad(lambda p, a=arguments: sum(terms(p, *a)[0].values()))(params)
            for name, tree in gradients.items():
                flat = traverse_util.flatten_dict(tree, sep=".")
                for path in sorted(flat, key=lambda p: _place(p, layers), reverse=True):
                    note(f"the {name}'s gradient of {path} is", flat[path])
        texts[:] = found
        return lax.pmin(jnp.array(list(found.values())).astype(jnp.int32), AXIS)

    fine = jax.device_get(pmap(look, hyperparameters(recipe))(state, batch))
    return next((t for t, f in zip(texts, fine, strict=True) if not f), "the new parameters are")


def _place(path: str, layers: list[str]) -> int:
    """Where in the forward pass a parameter is; at the end if it belongs to no layer."""
    return next((i for i, layer in enumerate(layers) if path.startswith(f"{layer}.")), len(layers))


def student_gradients(recipe: Recipe) -> Callable:
    """Makes `(state, batch, hyperparameters) -> gradients` of each of the student's losses alone.

    To be mapped by `pmap`. They are of the first micro-batch of `batch`: loss -> layer -> array, of
    adder layers' filters, or of all kernels if there are none. "own" is what a layer adds to its
    gradient itself ("pcnn" does), so that all of them sum to the gradient of an update.
    """
    terms = _terms(recipe)

    def gradients(state: DistillState, batch, given: dict):
        images, key = _prepared(recipe, given, state.step, 0, batch["image"][0])
        params, stats = _trees(state)
        arguments = stats, state.step, images, batch["label"][0], key, given

        def of_student(student):
            found, _ = terms({**params, "student": student}, *arguments)
            found.pop("teacher", None)
            return found

        found, pull_back = jax.vjp(of_student, state.student.params)
        zeros = jax.tree.map(jnp.zeros_like, found)
        own = pull_back(zeros)[0]
        each = {"own": own} | {
            name: jax.tree.map(jnp.subtract, pull_back({**zeros, name: jnp.ones(())})[0], own)
            for name in found
        }
        flat = {name: traverse_util.flatten_dict(tree, sep=".") for name, tree in each.items()}
        leaf = ".filters" if any(path.endswith(".filters") for path in flat["ce"]) else ".kernel"
        return lax.pmean(
            {
                name: {k.removesuffix(leaf): v for k, v in tree.items() if k.endswith(leaf)}
                for name, tree in flat.items()
            },
            AXIS,
        )

    return gradients


def gradient_shares(recipe: Recipe) -> Callable:
    """Makes `(state, batch, hyperparameters) -> shares` of the student's losses in its gradient.

        share of loss i in a layer = <g_i, g> / <g, g>,   g = sum_i g_i

    An adder layer's gradient is scaled to a fixed norm, so that these shares, which sum to 1, are
    all that the losses' weights mean to it. The names are `<loss>/<layer>`, see
    `student_gradients`.
    """
    gradients = student_gradients(recipe)

    def shares(state: DistillState, batch, given: dict):
        each = gradients(state, batch, given)
        total = jax.tree.map(lambda *all_losses: sum(all_losses), *each.values())
        return {
            f"{loss}/{layer}": jnp.vdot(gradient, total[layer])
            / jnp.maximum(jnp.vdot(total[layer], total[layer]), 1e-30)
            for loss, of_layers in each.items()
            for layer, gradient in of_layers.items()
        }

    return shares


def evaluation(model: linen.Module, mean, std) -> Callable:
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
      evaluations: name to a mapped `evaluation` and the variables for it.
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
            "accuracy": sums["correct"] / sums["count"],
            "top5": sums["top5"] / sums["count"],
            "loss": sums["loss"] / sums["count"],
        }
        for name, sums in totals.items()
    }


def batch_statistics(model: linen.Module, augmentation: Mapping[str, Any]) -> Callable:
    """Makes `(variables, batch) -> BatchNorm statistics of that batch alone`, for `pmap`.

    `batch` is a training batch with a leading axis of micro-batches, of which the first is used.
    Images are augmented as in training: without, ResNet-20 lost two points on CIFAR-10.
    """
    model = _synchronised(model)

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
            _, stats = _forward(model, variables, images, True, key)
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
        else {"params": variables["params"], "batch_stats": replicate(pool(*found[name]))}
        for name, (_, variables) in statistics.items()
    }
