"""The ordinary convolution, as `linen.Conv` calls it, with this package's kernels on CPUs.

XLA's own are slow there, the weight gradient most of all, and a teacher is half of a joint step.
On every other platform these primitives are `lax.conv_general_dilated`.
"""

import operator

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad

from pkkd_jax.ops import cpu, portable
from pkkd_jax.ops import geometry as geometry_lib
from pkkd_jax.ops.geometry import DIMENSIONS
from pkkd_jax.ops.primitive import define, vary_together

DTYPES = ("float32", "bfloat16", "float16")


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides,
    padding,
    lhs_dilation=None,
    rhs_dilation=None,
    dimension_numbers=None,
    feature_group_count: int = 1,
    precision=None,
    primitive: Primitive | None = None,
    **options,
) -> jax.Array:
    """`lax.conv_general_dilated`: a `conv_general_dilated` for `linen.Conv`.

    Two-dimensional NHWC convolutions of float32, bfloat16 or float16 without `lhs_dilation` have
    primitives of their own, differentiable any number of times, forward and backward; all others
    go to `lax.conv_general_dilated` as they are.

    Args:
      lhs: images, `[batch, height, width, c_in]`.
      rhs: kernel, `[kh, kw, c_in / feature_group_count, c_out]`.
      window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count,
        precision, **options: as there; the kernels for CPUs always multiply and add in float32.
      primitive: what stands in a trace, made by `define_forward`; "conv_forward" if None.
    Returns:
      `[batch, height', width', c_out]`, dtype of `lhs`.
    """
    dilated = lhs_dilation is not None and any(d != 1 for d in lhs_dilation)
    unusual = any(value not in (None, 1) for value in options.values())
    if isinstance(padding, str):
        unusual |= padding.upper() not in ("SAME", "VALID")
    if (
        lhs.ndim != 4
        or lhs.dtype != rhs.dtype
        or lhs.dtype.name not in DTYPES
        or dilated
        or unusual
        or dimension_numbers is None
        or lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers) != _NHWC
    ):
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            dimension_numbers,
            feature_group_count,
            precision=precision,
            **options,
        )
    if not isinstance(padding, str):
        padding = [tuple(map(operator.index, pair)) for pair in padding]
    geometry = geometry_lib.resolve(
        lhs.shape,
        rhs.shape,
        tuple(map(operator.index, window_strides)),
        padding,
        tuple(map(operator.index, rhs_dilation or (1, 1))),
        operator.index(feature_group_count),
    )
    if precision is None:  # of now: when the rule of a platform is traced, it may be another
        precision = jax.config.jax_default_matmul_precision
    primitive = primitive or forward_p
    return primitive.bind(*vary_together(lhs, rhs), geometry=geometry, precision=precision)


def sum_of_products(a: jax.Array, b: jax.Array) -> jax.Array:
    """`sum over images and places of a_i b_j`, the product of two tall and narrow matrices.

    Args:
      a: `[batch, height, width, channels]`, of a dtype that `conv_general_dilated` serves.
      b: likewise, with any number of channels.
    Returns:
      `[channels of a, channels of b]`, dtype of `a`, at the highest precision.
    """
    # The weight gradient of a 1x1 convolution, which is faster on CPUs than XLA's dot.
    shape = (1, 1, a.shape[-1], b.shape[-1])
    geometry = geometry_lib.resolve(a.shape, shape, 1, "VALID", 1, 1)
    product = weight_gradient_p.bind(
        *vary_together(a, b), geometry=geometry, precision="highest", shape=shape
    )
    return product[0, 0]


_NHWC = lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), DIMENSIONS)

input_gradient_p = define(
    "conv_input_gradient",
    {None: portable.product_input_gradient, "cpu": cpu.product_input_gradient},
    lambda w, dy, *, geometry, precision, shape: dy.update(shape=shape),
    filters=0,
)
weight_gradient_p = define(
    "conv_weight_gradient",
    {None: portable.product_weight_gradient, "cpu": cpu.product_weight_gradient},
    lambda x, dy, *, geometry, precision, shape: x.update(shape=shape),
    filters=-1,
)


# All are bilinear, and each is a transpose of the others.


def _input(w, dy, x, **parameters):
    return input_gradient_p.bind(w, dy, **{**parameters, "shape": x.aval.shape})


def _weight(x, dy, w, **parameters):
    return weight_gradient_p.bind(x, dy, **{**parameters, "shape": w.aval.shape})


def _forward(x, w, *, geometry, precision, shape):
    del shape
    return forward_p.bind(x, w, geometry=geometry, precision=precision)


def define_forward(name: str) -> Primitive:
    """Makes the primitive `name` of a forward convolution: a trace then tells what it convolves."""
    primitive = define(
        name,
        {None: portable.product_forward, "cpu": cpu.product_forward},
        lambda x, w, *, geometry, precision: x.update(
            shape=geometry.output_shape(x.shape, w.shape)
        ),
        filters=1,
    )
    ad.defbilinear(
        primitive,
        lambda dy, x, w, **parameters: _input(w, dy, x, **parameters),
        lambda dy, x, w, **parameters: _weight(x, dy, w, **parameters),
    )
    return primitive


forward_p = define_forward("conv_forward")
ad.defbilinear(
    input_gradient_p,
    lambda x, w, dy, **parameters: _weight(x, dy, w, **parameters),
    lambda x, w, dy, **parameters: _forward(x, w, **parameters),
)
ad.defbilinear(
    weight_gradient_p,
    lambda w, x, dy, **parameters: _input(w, dy, x, **parameters),
    lambda w, x, dy, **parameters: _forward(x, w, **parameters),
)
