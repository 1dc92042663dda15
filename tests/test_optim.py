"""The adaptive learning rate of adder filters, and optimisers by name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pkkd_jax import optim
from pkkd_jax.names import UserError


def tree(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "stem": {"kernel": jax.random.normal(keys[0], (3, 3, 3, 4))},
        "conv1": {"filters": 7 * jax.random.normal(keys[1], (3, 3, 4, 5))},
        "bn": {"scale": jax.random.normal(keys[2], (5,))},
    }


def test_only_filters_are_scaled_to_eta_times_root_k():
    gradient = tree(0)
    scaled, _ = optim.scale_by_adder_norm(0.2).update(gradient, optax.EmptyState())
    filters = np.asarray(gradient["conv1"]["filters"], np.float64)
    wanted = filters * 0.2 * np.sqrt(filters.size) / np.linalg.norm(filters)
    np.testing.assert_allclose(scaled["conv1"]["filters"], wanted, rtol=1e-5)
    assert scaled["stem"]["kernel"] is gradient["stem"]["kernel"]
    assert scaled["bn"]["scale"] is gradient["bn"]["scale"]


def test_a_zero_gradient_stays_zero():
    zero = {"filters": jnp.zeros((3, 3, 2, 2))}
    scaled, _ = optim.scale_by_adder_norm().update(zero, optax.EmptyState())
    assert (scaled["filters"] == 0).all()


def test_one_step_is_the_recipe():
    params, gradient = tree(1), tree(0)
    optimiser = optim.build(100, momentum=0.9)
    updates, _ = optimiser.update(gradient, optimiser.init(params), params)
    filters = np.asarray(gradient["conv1"]["filters"], np.float64)
    scaled = filters * 0.2 * np.sqrt(filters.size) / np.linalg.norm(filters)
    wanted = -0.1 * (scaled + 5e-4 * np.asarray(params["conv1"]["filters"]))
    np.testing.assert_allclose(updates["conv1"]["filters"], wanted, rtol=1e-4, atol=1e-7)
    kernel = -0.1 * (gradient["stem"]["kernel"] + 5e-4 * params["stem"]["kernel"])
    np.testing.assert_allclose(updates["stem"]["kernel"], kernel, rtol=1e-4, atol=1e-7)


def test_schedules_warm_up_and_end_at_zero():
    rate = optim.schedule("cosine", 0.1, 100, warmup_steps=10)
    assert rate(0) == 0
    np.testing.assert_allclose([rate(10), rate(55), rate(100)], [0.1, 0.05, 0], atol=1e-7)
    assert optim.schedule("constant", 0.1, 100)(99) == 0.1


def test_any_optax_optimiser_goes_by_name():
    params = tree(1)
    optimiser = optim.build(10, name="adamw", learning_rate=1e-3, b1=0.8)
    updates, _ = optimiser.update(tree(0), optimiser.init(params), params)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))


def test_weight_decay_is_the_optimisers_own_where_it_has_one():
    params, nothing = tree(1), jax.tree.map(jnp.zeros_like, tree(0))
    optimiser = optim.build(10, name="adamw", learning_rate=0.1, weight_decay=0.5)
    updates, _ = optimiser.update(nothing, optimiser.init(params), params)
    # In the gradient, Adam would have normalised it away.
    np.testing.assert_allclose(
        updates["stem"]["kernel"], -0.1 * 0.5 * params["stem"]["kernel"], rtol=1e-5
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "adamww"}, "'adamww': did you mean 'adamw'"),
        ({"momemtum": 0.9}, "'momemtum': did you mean 'momentum'"),
        ({"schedule_name": "cosin"}, "'cosin': did you mean 'cosine'"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_named(arguments, message):
    with pytest.raises(UserError, match=message):
        optim.build(10, **arguments)


def test_cycles_start_the_schedule_again_and_the_rest_prolongs_the_last():
    rate = optim.schedule("cosine", 0.1, 32, 0, 3)  # cycles of 10, 10 and 12 steps
    one = optim.schedule("cosine", 0.1, 10)
    for step in range(20):
        np.testing.assert_allclose(rate(step), one(step % 10), rtol=1e-6)
    np.testing.assert_allclose([rate(20), rate(29)], [one(0), one(9)], rtol=1e-6)
    assert rate(31) < rate(29)
