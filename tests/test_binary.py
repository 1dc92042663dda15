"""One-bit convolutions against float64 formulations, and their surrogate gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pkkd_jax import models, nn
from pkkd_jax.ops import binary


def convolve(x, w):
    """A float64 convolution without padding."""
    kh, kw = w.shape[:2]
    rows, columns = x.shape[1] - kh + 1, x.shape[2] - kw + 1
    y = np.zeros((len(x), rows, columns, w.shape[3]))
    for i in range(rows):
        for j in range(columns):
            y[:, i, j] = np.tensordot(x[:, i : i + kh, j : j + kw], w, 3)
    return y


def signs(x):
    return np.where(x >= 0, 1.0, -1.0)


@pytest.fixture
def operands():
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, 6, 5, 3)), rng.normal(size=(3, 2, 3, 4)) * 0.7


NUMBERS = ("NHWC", "HWIO", "NHWC")


def test_a_binary_convolution_equals_the_float64_formulation(operands):
    x, w = operands
    found = binary.binary_conv(
        jnp.float32(x), jnp.float32(w), (1, 1), "VALID", dimension_numbers=NUMBERS
    )
    wanted = convolve(signs(x), signs(w) * np.abs(w).mean((0, 1, 2)))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_gradient_passes_the_sign_where_the_activation_is_within_one():
    x = jnp.array([-2.0, -0.5, 0.0, 0.5, 2.0])
    np.testing.assert_array_equal(binary.sign(x), [-1, -1, 1, 1, 1])
    gradient = jax.vjp(binary.sign, x)[1](jnp.full(5, 3.0))[0]
    np.testing.assert_array_equal(gradient, [0, 3, 3, 3, 0])


def test_the_sign_of_nan_is_nan():
    assert jnp.isnan(binary.sign(jnp.array([jnp.nan, 1.0]))).tolist() == [True, False]


@pytest.mark.parametrize("conv", ["binary", "pcnn"])
def test_a_trace_tells_a_one_bit_convolution_from_an_ordinary_one(conv):
    layer, images = nn.convolution(conv)(4, (3, 3)), jnp.zeros((1, 5, 5, 2))
    trace = str(jax.make_jaxpr(lambda x: layer.init_with_output(jax.random.key(0), x))(images))
    assert "binary_forward" in trace
    assert "conv_forward" not in trace


def test_projected_filters_take_two_values(operands):
    w = operands[1]
    found = binary.project(jnp.float32(w), jnp.ones((3, 2)), 1e-4, 0.1)
    np.testing.assert_allclose(found, np.abs(w).mean() * signs(w), rtol=1e-6)


def test_the_gradient_of_the_projection_loss_reaches_filters_and_projection(operands):
    """Without a gradient from behind, it is the derivative of the loss with its result held."""
    w, p = jnp.float32(operands[1]), jnp.linspace(0.5, 1.5, 6).reshape(3, 2)

    def loss(w, p, result):
        return 0.3 / 2 * jnp.square(p[:, :, None, None] * w - result).sum()

    result, vjp = jax.vjp(lambda w, p: binary.project(w, p, 0.3, 0.1), w, p)
    wanted = jax.grad(loss, (0, 1))(w, p, result)
    for a, b in zip(vjp(jnp.zeros_like(result)), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_gradient_from_behind_passes_within_one_and_moves_the_filters(operands):
    rng = np.random.default_rng(1)
    w, p = 2 * operands[1], rng.normal(1.0, 0.5, (3, 2))
    d, each = rng.normal(size=w.shape), p[:, :, None, None]
    arguments = (jnp.float32(w), jnp.float32(p))
    result, vjp = jax.vjp(lambda w, p: binary.project(w, p, 0.3, 0.1), *arguments)
    of_w, of_p = vjp(jnp.float32(d))
    result = np.asarray(result, np.float64)
    passed = np.where(np.abs(each * w) <= 1, d, 0)
    assert 0 < (passed == 0).sum() < w.size
    missed = 0.3 * (each * (w + 0.1 * d) - result)
    np.testing.assert_allclose(of_w, (passed + missed) * each, rtol=1e-4, atol=1e-5)
    wanted = passed * w + missed * (w + 0.1 * d) - 0.3 * each * (0.1 * d) ** 2
    np.testing.assert_allclose(of_p, wanted.sum((2, 3)), rtol=1e-4, atol=1e-4)


def test_the_gradient_of_the_filters_goes_through_sign_and_scale(operands):
    x, w = (jnp.float32(operand) for operand in operands)
    convolve_ = lambda w: binary.binary_conv(  # noqa: E731
        x, w, (1, 1), "VALID", dimension_numbers=NUMBERS
    )
    y, vjp = jax.vjp(convolve_, w)
    d = np.random.default_rng(2).normal(size=y.shape)
    # The derivative for the scaled filters s a, which is linear, and then s' = 1 and a' by hand.
    linear = jax.vjp(lambda f: binary.conv_general_dilated(
        binary.sign(x), f, (1, 1), "VALID", dimension_numbers=NUMBERS), w)[1]  # fmt: skip
    of_filters = np.asarray(linear(jnp.float32(d))[0], np.float64)
    w64, count = np.asarray(w, np.float64), w[..., 0].size
    scale = np.abs(w64).mean((0, 1, 2))
    through_sign = np.where(np.abs(w64) <= 1, of_filters * scale, 0)
    through_scale = (of_filters * signs(w64)).sum((0, 1, 2)) * signs(w64) / count
    found = vjp(jnp.float32(d))[0]
    np.testing.assert_allclose(found, through_sign + through_scale, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("conv", ["binary", "pcnn"])
def test_a_one_bit_network_sees_both_signs_and_learns_in_every_layer(conv):
    model = models.build("resnet_cifar", depth=8, num_classes=10, conv=conv)
    images = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    variables = model.init(jax.random.key(1), images, train=False)

    def loss(params):
        outputs, _ = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return jnp.square(outputs.logits[:, 0] - 1).mean(), outputs.features

    gradient, features = jax.grad(loss, has_aux=True)(variables["params"])
    assert float(features["stage1.block1.out"].min()) < 0
    flat = jax.tree_util.tree_leaves_with_path(gradient)
    assert any("projection" in str(path) for path, _ in flat) == (conv == "pcnn")
    assert all(float(jnp.abs(leaf).max()) > 0 for path, leaf in flat if "kernel" in str(path))
