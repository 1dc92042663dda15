"""AdderConv against linen.Conv, and what every network returns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from jax import lax

from pkkd_jax.names import UserError
from pkkd_jax.nn import AdderConv, Conv, Outputs, convolution
from pkkd_jax.ops.adder import adder_conv

KEY = jax.random.key(0)


def shapes(layer, *input_shape, dtype=jnp.float32):
    """Shapes of `(output, variables)`, nothing computed."""
    images = jax.ShapeDtypeStruct(input_shape, dtype)
    return jax.eval_shape(lambda x: layer.init_with_output(KEY, x), images)


def test_fields_are_those_of_linen_conv_and_input_gradient():
    ours = [field.name for field in dataclasses.fields(AdderConv)]
    theirs = [field.name for field in dataclasses.fields(linen.Conv)]
    assert [name for name in ours if name != "input_gradient"] == theirs


def test_defaults_are_those_of_linen_conv_but_for_the_start_of_the_filters():
    ours, theirs = AdderConv(4, (3, 3)), linen.Conv(4, (3, 3))
    different = {
        field.name
        for field in dataclasses.fields(linen.Conv)
        # An initializer is a new function each time it is asked for.
        if field.name != "bias_init" and getattr(ours, field.name) != getattr(theirs, field.name)
    }
    assert different == {"kernel_init"}


def test_layer_is_the_operation_on_its_filters_plus_bias():
    x = jax.random.normal(KEY, (2, 7, 6, 4))
    layer = AdderConv(6, (3, 2), (2, 1), ((1, 0), 2), kernel_dilation=(1, 2), feature_group_count=2)
    variables = layer.init(KEY, x)
    bias = jnp.arange(6.0)
    expected = bias + adder_conv(
        x,
        variables["params"]["filters"],
        strides=(2, 1),
        padding=((1, 0), (2, 2)),
        kernel_dilation=(1, 2),
        feature_group_count=2,
    )
    variables = {"params": {**variables["params"], "bias": bias}}
    np.testing.assert_allclose(layer.apply(variables, x), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"strides": 2},
        {"strides": None, "kernel_dilation": None, "input_dilation": [1, 1]},
        {"padding": "VALID", "kernel_dilation": 2},
        {"padding": 1, "strides": (2, 1)},
        {"padding": (1, 2)},
        {"padding": [(1, 0), (2, 3)], "use_bias": False},
        {"feature_group_count": 3},
        {"dtype": jnp.bfloat16},
        {"param_dtype": jnp.bfloat16},
        {"precision": "default"},
    ],
)
def test_shapes_and_dtypes_are_those_of_linen_conv(fields):
    output, variables = shapes(AdderConv(6, (3, 2), **fields), 2, 9, 8, 3)
    expected, theirs = shapes(linen.Conv(6, (3, 2), **fields), 2, 9, 8, 3)
    theirs["params"]["filters"] = theirs["params"].pop("kernel")
    assert (output, variables) == (expected, theirs)


@pytest.mark.parametrize("batch", [(), (2, 5), (0,), (3, 0)])
def test_batch_dimensions_are_taken_as_linen_conv_takes_them(batch):
    output, _ = shapes(AdderConv(4, (3, 3)), *batch, 8, 8, 3)
    assert output.shape == (*batch, 8, 8, 4)


def test_more_batch_dimensions_change_no_value():
    x = jax.random.normal(KEY, (2, 3, 5, 4, 2))
    layer = AdderConv(3, (3, 3))
    variables = layer.init(KEY, x)
    flat = layer.apply(variables, x.reshape(6, 5, 4, 2))
    np.testing.assert_array_equal(layer.apply(variables, x), flat.reshape(2, 3, 5, 4, 3))


def test_an_int_kernel_size_is_square():
    _, variables = shapes(AdderConv(4, 5), 1, 8, 8, 3)
    assert variables["params"]["filters"].shape == (5, 5, 3, 4)


def test_filters_start_from_a_standard_normal():
    layer = AdderConv(128, (3, 3), use_bias=False)
    filters = np.asarray(layer.init(KEY, jnp.zeros((1, 3, 3, 64)))["params"]["filters"])
    error = 1 / np.sqrt(filters.size)
    assert abs(filters.mean()) < 5 * error
    assert abs(filters.std() - 1) < 5 * error
    assert abs((filters**4).mean() - 3) < 5 * np.sqrt(96) * error  # no truncation at 2


def test_input_gradient_reaches_the_operation():
    x = jnp.zeros((1, 1, 1, 1))

    def gradient(name):
        layer = AdderConv(1, 1, input_gradient=name, kernel_init=linen.initializers.constant(3.0))
        variables = layer.init(KEY, x)
        return float(jax.grad(lambda x: layer.apply(variables, x).sum())(x).sum())

    assert (gradient("hardtanh"), gradient("full")) == (1.0, 3.0)


@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [
        ("input_dilation", (2, 1), "allowed: 1"),
        ("mask", "ones", "allowed: None"),
        ("precision", lax.Precision.HIGHEST, "allowed: None"),
        ("conv_general_dilated", lax.conv_general_dilated, "allowed: None"),
        ("conv_general_dilated_cls", object, "allowed: None"),
        ("kernel_size", (3,), "allowed: a positive int or two"),
        ("kernel_size", (3, 3, 3), "allowed: a positive int or two"),
        ("kernel_size", 0, "allowed: a positive int or two"),
        ("padding", "CIRCULAR", "expected 'SAME', 'VALID'"),
        ("padding", "CAUSAL", "expected 'SAME', 'VALID'"),
        ("strides", (2, 2, 2), "expected a positive int or two"),
        ("kernel_dilation", 0, "expected a positive int or two"),
        ("feature_group_count", 2, "feature_group_count"),
        ("input_gradient", "tanh", "expected one of hardtanh"),
    ],
)
def test_what_an_adder_cannot_honour_is_refused_with_its_value(argument, value, allowed):
    with pytest.raises(ValueError, match=argument) as error:
        shapes(AdderConv(**{"features": 4, "kernel_size": (3, 3), argument: value}), 1, 8, 8, 3)
    assert repr(value) in str(error.value)
    assert allowed in str(error.value)


def test_a_wrong_number_of_groups_shows_both_shapes():
    with pytest.raises(ValueError, match=r"1, 8, 8, 3.*3, 3, 1, 4"):
        shapes(AdderConv(4, (3, 3), feature_group_count=2), 1, 8, 8, 3)


@pytest.mark.parametrize(("name", "layer"), [("conv", Conv), ("adder", AdderConv)])
def test_convolutions_have_names(name, layer):
    assert convolution(name) is layer


def test_a_dotted_path_names_a_convolution_of_the_users_own():
    assert convolution("flax.linen.ConvTranspose") is linen.ConvTranspose


def test_a_wrong_convolution_gets_the_nearest_name():
    with pytest.raises(UserError, match="did you mean 'adder'"):
        convolution("ader")


def test_features_keep_forward_order_through_jit():
    outputs = jax.jit(lambda: Outputs(jnp.zeros(1), {"stem": jnp.zeros(1), "a": jnp.zeros(1)}))()
    assert list(outputs.features) == ["stem", "a"]
