"""The adder convolution against float64 loops, under every transformation, for every platform."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import implementations
from jax import export, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pkkd_jax.ops import adder, cpu, gpu
from pkkd_jax.ops.adder import adder_conv
from pkkd_jax.ops.batch_norm import batch_norm


def reference(x, w, dy, strides, padding, dilation, groups, input_gradient="hardtanh"):
    """Loops over every term in float64; `padding` is explicit pairs. Returns y, dx, dw."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    (top, bottom), (left, right) = padding
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    n, height, width, _ = padded.shape
    kh, kw, c_group, c_out = w.shape
    ho = (height - (kh - 1) * dilation[0] - 1) // strides[0] + 1
    wo = (width - (kw - 1) * dilation[1] - 1) // strides[1] + 1
    y, dw, dpadded = np.zeros((n, ho, wo, c_out)), np.zeros_like(w), np.zeros_like(padded)
    surrogate = {
        "hardtanh": lambda d: np.minimum(np.maximum(d, -1.0), 1.0),
        "sign": np.sign,
        "full": lambda d: d,
    }[input_gradient]
    for i, j, u, v in itertools.product(range(ho), range(wo), range(kh), range(kw)):
        row, column = i * strides[0] + u * dilation[0], j * strides[1] + v * dilation[1]
        for o in range(c_out):
            channels = slice(
                o // (c_out // groups) * c_group, (o // (c_out // groups) + 1) * c_group
            )
            difference = padded[:, row, column, channels] - w[u, v, :, o]
            y[:, i, j, o] -= np.abs(difference).sum(1)
            if dy is not None:
                g = np.asarray(dy, np.float64)[:, i, j, o, None]
                dw[u, v, :, o] += (g * difference).sum(0)
                dpadded[:, row, column, channels] += g * surrogate(-difference)
    dx = dpadded[:, top : height - bottom, left : width - right]
    return y, dx, dw


def same(size, taps, stride, dilation):
    """XLA's SAME: output ceil(size / stride), the odd pixel of padding goes to the end."""
    total = max(0, (-(-size // stride) - 1) * stride + (taps - 1) * dilation + 1 - size)
    return total // 2, total - total // 2


def data(shape_x, shape_w, seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return jax.random.normal(keys[0], shape_x), jax.random.normal(keys[1], shape_w)


# image (n, h, w, c_in), filter (kh, kw), c_out, strides, padding, dilation, groups
CASES = [
    ((2, 7, 5, 3), (3, 3), 4, (1, 1), "SAME", (1, 1), 1),
    ((2, 8, 6, 3), (3, 3), 5, (2, 2), "SAME", (1, 1), 1),
    ((1, 9, 7, 2), (2, 4), 3, (1, 2), "SAME", (1, 1), 1),
    ((1, 10, 11, 2), (3, 2), 3, (3, 2), "VALID", (1, 1), 1),
    ((2, 7, 7, 4), (3, 3), 6, (2, 1), ((2, 0), (1, 3)), (1, 1), 2),
    ((1, 9, 9, 6), (3, 3), 6, (1, 1), 1, (1, 1), 6),
    ((1, 8, 9, 2), (3, 3), 3, (2, 2), "SAME", (2, 3), 1),
    ((3, 1, 1, 5), (1, 1), 2, (1, 1), "VALID", (1, 1), 1),
    ((1, 1, 1, 1), (3, 3), 1, (1, 1), "SAME", (1, 1), 1),
    ((2, 6, 5, 1), (1, 1), 1, (2, 2), "SAME", (1, 1), 1),
    ((1, 5, 6, 17), (3, 3), 19, (1, 1), "SAME", (1, 1), 1),
    ((1, 7, 6, 33), (1, 1), 34, (3, 3), 0, (1, 1), 1),
    ((1, 6, 7, 2), (5, 5), 2, (3, 3), (2, 1), (1, 1), 1),
    ((1, 6, 6, 2), (3, 3), 2, (1, 1), ((-1, 0), (1, -1)), (1, 1), 1),
]


def pairs(case):
    shape, taps, _, strides, padding, dilation, _ = case
    if padding == "SAME":
        return tuple(same(*a) for a in zip(shape[1:3], taps, strides, dilation, strict=True))
    if padding == "VALID":
        return ((0, 0), (0, 0))
    padding = (padding, padding) if isinstance(padding, int) else padding
    return tuple((p, p) if isinstance(p, int) else p for p in padding)


def reference_with_crop(x, w, dy, strides, padding, *rest):
    """The reference for negative padding too, which crops."""
    crop = [[max(0, -p) for p in pair] for pair in padding]
    height, width = x.shape[1:3]
    view = (
        slice(None),
        slice(crop[0][0], height - crop[0][1]),
        slice(crop[1][0], width - crop[1][1]),
    )
    positive = tuple(tuple(max(0, p) for p in pair) for pair in padding)
    y, inner, dw = reference(x[view], w, dy, strides, positive, *rest)
    dx = np.zeros(x.shape)
    dx[view] = inner
    return y, dx, dw


@pytest.mark.parametrize("implementation", implementations(), indirect=True)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op_equals_float64_loops(case, implementation):
    shape, taps, c_out, strides, padding, dilation, groups = case
    x, w = data(shape, (*taps, shape[3] // groups, c_out))
    op = functools.partial(
        adder_conv,
        strides=strides,
        padding=padding,
        kernel_dilation=dilation,
        feature_group_count=groups,
    )
    y, vjp = jax.vjp(op, x, w)
    dy = jax.random.normal(jax.random.key(2), y.shape)
    expected = reference_with_crop(x, w, dy, strides, pairs(case), dilation, groups)
    for actual, wanted in zip((y, *vjp(dy)), expected, strict=True):
        assert actual.shape == wanted.shape
        assert np.abs(actual - wanted).max() <= 5e-6 * np.abs(wanted).max()


@pytest.mark.parametrize("implementation", implementations(), indirect=True)
def test_integers_are_summed_exactly(implementation):
    x, w = data((2, 7, 6, 19), (3, 3, 19, 18))
    x, w = jnp.round(500 * x), jnp.round(500 * w)
    expected, *_ = reference(x, w, None, (1, 1), ((1, 1), (1, 1)), (1, 1), 1)
    np.testing.assert_array_equal(adder_conv(x, w, padding=1), expected)


@pytest.mark.parametrize("implementation", implementations(), indirect=True)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_seen_where_it_lies_and_nowhere_else(value, implementation):
    x, w = data((1, 6, 7, 5), (3, 3, 5, 4))
    y = adder_conv(x, w, padding=1)
    broken = adder_conv(x.at[0, 1, 2, 3].set(value), w, padding=1)
    seen = np.zeros(y.shape, bool)
    seen[0, :3, 1:4] = True
    np.testing.assert_array_equal(broken[~seen], y[~seen])
    np.testing.assert_array_equal(broken[seen], -abs(value))


@pytest.mark.parametrize("implementation", implementations(), indirect=True)
@pytest.mark.parametrize("input_gradient", ["sign", "full"])
def test_ablation_changes_dx_only(input_gradient, implementation):
    x, w = data((1, 7, 6, 3), (3, 3, 3, 4))
    y, vjp = jax.vjp(
        functools.partial(adder_conv, strides=2, padding=1, input_gradient=input_gradient), x, w
    )
    dy = jax.random.normal(jax.random.key(2), y.shape)
    expected = reference(x, w, dy, (2, 2), ((1, 1), (1, 1)), (1, 1), 1, input_gradient)
    for actual, wanted in zip((y, *vjp(dy)), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=2e-5, atol=2e-5)


def test_vjp_is_not_the_derivative_of_the_forward():
    x, w = data((1, 5, 5, 2), (3, 3, 2, 3))

    def plain(x, w):
        patches = lax.conv_general_dilated_patches(
            x, (3, 3), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return -jnp.abs(patches[..., None] - w.transpose(2, 0, 1, 3).reshape(-1, 3)).sum(3)

    np.testing.assert_allclose(adder_conv(x, w), plain(x, w), rtol=1e-5)
    surrogate = jax.grad(lambda x, w: adder_conv(x, w).sum(), (0, 1))(x, w)
    derivative = jax.grad(lambda x, w: plain(x, w).sum(), (0, 1))(x, w)
    for ours, theirs in zip(surrogate, derivative, strict=True):
        assert np.abs(ours - theirs).max() > 0.1


def test_before_batch_norm_filters_learn_by_the_gradient_of_a_convolution():
    # BatchNorm's gradient sums to zero over images and places, and with it the part -w sum(dy).
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], (4, 7, 6, 3)), jax.random.normal(keys[1], (3, 3, 3, 5))
    weights = jax.random.normal(keys[2], (4, 4, 3, 5))

    def above(y):
        z = batch_norm(y, jnp.arange(1.0, 6), jnp.zeros(5), 1e-5)[0]
        return (weights * jnp.tanh(z)).sum()

    learned = jax.grad(lambda w: above(adder_conv(x, w, strides=2)))(w)
    dy = jax.grad(above)(adder_conv(x, w, strides=2))
    dimensions = ("NHWC", "HWIO", "NHWC")
    of_w = jax.vjp(
        lambda w: lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=dimensions), w
    )[1]
    np.testing.assert_allclose(learned, of_w(dy)[0], rtol=1e-4, atol=1e-5)


def test_a_padded_place_adds_minus_abs_w():
    w = jax.random.normal(jax.random.key(0), (3, 3, 2, 4))
    y = adder_conv(jnp.zeros((1, 1, 1, 2)), w, padding="SAME")
    np.testing.assert_allclose(y[0, 0, 0], -jnp.abs(w).sum((0, 1, 2)), rtol=1e-6)


def test_bfloat16_accumulates_in_float32():
    x, w = data((2, 6, 6, 64), (3, 3, 64, 8))
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    y, vjp = jax.vjp(functools.partial(adder_conv, padding=1), x, w)
    dy = jax.random.normal(jax.random.key(2), y.shape).astype(jnp.bfloat16)
    expected = reference(x, w, dy, (1, 1), ((1, 1), (1, 1)), (1, 1), 1)
    for actual, wanted in zip((y, *vjp(dy)), expected, strict=True):
        assert actual.dtype == jnp.bfloat16
        # One rounding of the result to 8 bits, no more: a bfloat16 sum of 576 terms loses 5 bits.
        np.testing.assert_allclose(
            np.float64(actual), wanted, rtol=2**-8, atol=1e-2 * np.abs(wanted).mean()
        )


AXES = [(0, None), (None, 0), (0, 0), (2, 1)]


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_vmap_equals_a_loop(axes, groups):
    x, w = data((3, 2, 5, 6, 4), (3, 3, 3, 4 // groups, 6))
    move = lambda a, axis: a[0] if axis is None else jnp.moveaxis(a, 0, axis)  # noqa: E731
    take = lambda a, axis, i: a if axis is None else jnp.take(a, i, axis)  # noqa: E731
    op = functools.partial(adder_conv, strides=(2, 1), feature_group_count=groups)

    def all_three(x, w):
        y, vjp = jax.vjp(op, x, w)
        return (y, *vjp(jnp.cos(y / 50)))

    x, w = move(x, axes[0]), move(w, axes[1])
    batched = jax.vmap(all_three, axes)(x, w)
    for i in range(3):
        alone = all_three(take(x, axes[0], i), take(w, axes[1], i))
        for one, many in zip(alone, batched, strict=True):
            np.testing.assert_allclose(one, many[i], rtol=1e-5, atol=1e-5)


def grads(x, w):
    return jax.value_and_grad(lambda x, w: jnp.sin(adder_conv(x, w, strides=2)).sum(), (0, 1))(x, w)


def assert_trees_close(actual, wanted):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), actual, wanted
    )


def test_jit_remat_and_no_jit_agree():
    x, w = data((2, 6, 7, 3), (3, 3, 3, 4))
    wanted = jax.jit(grads)(x, w)
    assert_trees_close(grads(x, w), wanted)
    rematted = jax.value_and_grad(
        jax.checkpoint(lambda x, w: jnp.sin(adder_conv(x, w, strides=2)).sum()), (0, 1)
    )
    assert_trees_close(jax.jit(rematted)(x, w), wanted)
    with jax.disable_jit():
        assert_trees_close(grads(x, w), wanted)


def test_pmap_equals_one_device():
    x, w = data((4, 2, 6, 7, 3), (3, 3, 3, 4))
    sharded = jax.pmap(
        lambda x, w: jax.tree.map(lambda a: lax.psum(a, "i"), grads(x, w)[1][1]),
        axis_name="i",
        in_axes=(0, None),
    )(x, w)
    wanted = grads(x.reshape(8, 6, 7, 3), w)[1][1]
    np.testing.assert_allclose(sharded[0], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_equals_one_device(check_vma):
    x, w = data((8, 6, 7, 3), (3, 3, 3, 4))
    mesh = Mesh(np.array(jax.devices()[:4]), ("i",))

    def local(x, w):
        value, (dx, dw) = grads(x, w)
        # With check_vma the gradient of the replicated w is already summed over the axis.
        total = lax.psum(value, "i")
        return total, dx, dw if check_vma else lax.psum(dw, "i")

    mapped = jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P("i"), P()),
            out_specs=(P(), P("i"), P()),
            check_vma=check_vma,
        )
    )
    value, (dx, dw) = grads(x, w)
    assert_trees_close(mapped(x, w), (value, dx, dw))


def test_every_primitive_is_reached_and_lowers_for_every_platform():
    x, w = data((2, 6, 7, 3), (3, 3, 3, 4))
    assert all(f"adder_{rule}" in str(jax.make_jaxpr(grads)(x, w)) for rule in adder.RULES)
    exported = export.export(jax.jit(grads), platforms=("cpu", "cuda", "tpu"))(x, w)
    assert "@pkkd_" not in exported.mlir_module()
    again = export.deserialize(exported.serialize())
    assert_trees_close(again.call(x, w), grads(x, w))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_one_absent_platform(platform):
    x, w = data((2, 6, 7, 3), (3, 3, 3, 4))
    text = jax.jit(grads).trace(x, w).lower(lowering_platforms=(platform,)).as_text()
    # Two images are too few for the kernel of TPUs.
    kernels = platform == "cuda" and gpu.selected() == "mosaic"
    assert ("mosaic_gpu" if kernels else "while") in text


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_plain_jax_serves_where_xla_splits_a_program_over_devices(platform):
    mesh = Mesh(np.array(jax.devices()), ("i",))
    x, w = (
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in (((64 * len(jax.devices()), 4, 4, 8), P("i")), ((3, 3, 8, 8), P()))
    )
    lower = {"lowering_platforms": (platform,)}
    assert "while" in jax.jit(grads).trace(x, w).lower(**lower).as_text()
    mapped = jax.shard_map(
        lambda x, w: adder_conv(x, w), mesh=mesh, in_specs=(P("i"), P()), out_specs=P("i")
    )
    text = jax.jit(mapped).trace(x, w).lower(**lower).as_text()
    assert ("while" in text) == (platform == "cuda" and gpu.selected() == "portable")


def test_memory_is_of_the_order_of_input_plus_output():
    x, w = data((4, 32, 32, 32), (3, 3, 32, 32))
    compiled = jax.jit(grads).lower(x, w).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * (2 * x.nbytes)


def test_implementation_names_what_serves_the_platform():
    assert adder.implementation() == cpu.selected()
    assert adder.implementation("cuda") == gpu.selected()
    assert adder.implementation("tpu") == "pallas"
    assert adder.implementation("rocm") == "portable"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"padding": "FULL"}, "padding='FULL'"),
        ({"padding": ((1, 1),)}, "padding="),
        ({"strides": 0}, "strides=0"),
        ({"kernel_dilation": (1, 0)}, r"kernel_dilation=\(1, 0\)"),
        ({"feature_group_count": 3}, "feature_group_count=3"),
        ({"input_gradient": "l2"}, "input_gradient='l2'"),
    ],
    ids=str,
)
def test_a_bad_argument_is_named(arguments, message):
    x, w = data((1, 5, 5, 2), (3, 3, 2, 4))
    with pytest.raises(ValueError, match=message):
        adder_conv(x, w, **arguments)


@pytest.mark.parametrize("dtype", ["uint8", "int32"])
def test_a_dtype_that_would_lose_the_result_is_refused(dtype):
    x, w = data((1, 5, 5, 2), (3, 3, 2, 4))
    with pytest.raises(ValueError, match=f"x.dtype=dtype\\('{dtype}'\\)"):
        adder_conv(x.astype(dtype), w)


def test_shapes_that_do_not_fit_are_shown():
    x, w = data((1, 5, 5, 2), (3, 3, 3, 4))
    with pytest.raises(ValueError, match=r"\(1, 5, 5, 2\).*\(3, 3, 3, 4\)"):
        adder_conv(x, w)
