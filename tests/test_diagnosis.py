"""Where an update stops being finite; what each loss has in the gradient of each layer."""

import jax
import jax.numpy as jnp
import numpy as np
from test_update import batch, examples, initial, recipe

from pkkd_jax import devices, diagnosis, distill
from pkkd_jax.recipe import hyperparameters, init_state


def gradient_shares(the_recipe, state):
    mapped = devices.pmap(diagnosis.gradient_shares(the_recipe), hyperparameters(the_recipe))
    return jax.device_get(mapped(state, batch(1)))


def test_a_gradient_that_is_not_finite_is_looked_for_in_the_order_of_the_backward_pass():
    def apply(params, student, teacher, axis_name):
        # 0 with a derivative of 0/0, from where it spreads to all layers before.
        loss = jnp.sqrt(0 * jnp.abs(student.features["stage3.block1.conv1"])).mean()
        return loss, {"loss_odd": loss}

    odd = distill.Distiller(lambda *arguments: {}, apply)
    broken = recipe(losses={"odd": (1.0, odd)})
    state = init_state(broken, examples()[0])
    found = diagnosis.first_not_finite(broken, jax.device_get(state), batch(1))
    assert found == "the student's gradient of stage3_block1.conv1.filters is"


def test_the_losses_shares_in_each_layers_gradient_sum_to_one():
    start = initial()
    shares = gradient_shares(recipe(), start)
    layers = {name.partition("/")[2] for name in shares}
    assert len(layers) == 8  # the adder layers of ResNet-8
    for layer in layers:
        each = [shares[f"{loss}/{layer}"] for loss in ("ce", "pkkd", "kd", "own")]
        assert each[-1] == 0
        np.testing.assert_allclose(sum(each), 1, rtol=1e-4)
    heavier = recipe(alpha=50.0)
    found = gradient_shares(heavier, start)
    assert all(found[name] > shares[name] for name in shares if name.startswith("ce/"))
