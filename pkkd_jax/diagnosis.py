"""What an update did: where it stopped being finite, and what each loss has in its gradient."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import lax

from pkkd_jax import devices, update
from pkkd_jax.devices import AXIS
from pkkd_jax.recipe import Recipe, forward, hyperparameters
from pkkd_jax.state import DistillState


def first_not_finite(recipe: Recipe, state: DistillState, batch) -> str:
    """What is not finite first in the update of `state` by `batch`, in words.

    Responses of the teacher's and then of the student's layers are looked at in the order of the
    forward pass, then the losses, then gradients in the order of the backward pass.
    """
    terms = update.loss_terms(recipe)
    texts: list[str] = []

    def look(state, batch, given):
        params, stats = update.trees(state)
        found: dict[str, jax.Array] = {}

        def note(text, tree):
            found[text] = found.get(text, True) & update.all_finite(tree)

        for index in range(batch["label"].shape[0]):
            images, key = update.prepare(recipe, given, state.step, index, batch["image"][index])
            layers: dict[str, list[str]] = {}
            for name in ("teacher", "student"):
                model, train = getattr(recipe, name), name == "student" or recipe.teacher_learns
                if model is None:
                    continue
                variables = {"params": params[name], "batch_stats": stats[name]}
                model = update.synchronised(model) if train else model
                outputs, _ = forward(model, variables, images, train, key)
                layers[name] = list(outputs.features)
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
                order = layers.get(name, [])
                for path in sorted(flat, key=lambda p: _place(p, order), reverse=True):
                    note(f"the {name}'s gradient of {path} is", flat[path])
        texts[:] = found
        return lax.pmin(jnp.array(list(found.values())).astype(jnp.int32), AXIS)

    fine = jax.device_get(devices.pmap(look, hyperparameters(recipe))(state, batch))
    return next((t for t, f in zip(texts, fine, strict=True) if not f), "the new parameters are")


def _place(path: str, layers: list[str]) -> int:
    """Where in the forward pass a parameter is; at the end if it belongs to no layer."""
    path = path.replace("_", ".")  # a tap is named stage1.block1, its module stage1_block1
    heads = [f"{layer.replace('_', '.')}." for layer in layers]
    return next((i for i, head in enumerate(heads) if path.startswith(head)), len(layers))


def student_gradients(recipe: Recipe) -> Callable:
    """Makes `(state, batch, hyperparameters) -> gradients` of each of the student's losses alone.

    To be mapped by `pmap`. They are of the first micro-batch of `batch`: loss -> layer -> array, of
    adder layers' filters, or of all kernels if there are none. "own" is what a layer adds to its
    gradient itself ("pcnn" does), so that all of them sum to the gradient of an update.
    """
    terms = update.loss_terms(recipe)

    def gradients(state: DistillState, batch, given: dict):
        images, key = update.prepare(recipe, given, state.step, 0, batch["image"][0])
        params, stats = update.trees(state)
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
