"""The adder convolution: one differentiable function over primitives with a rule per platform.

A primitive, and not `lax.platform_dependent`, because one exported program must serve several
platforms, and because the process that lowers need not have the device.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.backend import get_backend
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from pkkd_jax.ops import geometry as geometry_lib
from pkkd_jax.ops import portable
from pkkd_jax.ops.geometry import Geometry

# Every lowering rule of the package; `None` serves each platform that has no line of its own. A
# rule is `(operands..., geometry) -> array`, traced by JAX.
RULES = {
    "forward": {None: portable.forward},
    "input_gradient": {None: portable.input_gradient},
    "weight_gradient": {None: portable.weight_gradient},
}

DTYPES = {jnp.dtype(name) for name in ("float32", "bfloat16", "float16")}


def implementation(platform: str | None = None) -> str:
    """Names the implementation that `platform` uses: "portable" is plain JAX.

    Args:
      platform: "cpu", "cuda", "rocm" or "tpu"; that of this process's default device if None.
    """
    if platform is None:
        platform = jax.default_backend()
        if platform == "gpu":  # JAX's one name for two
            version = get_backend().platform_version.lower()
            platform = "rocm" if "rocm" in version else "cuda"
    rule = RULES["forward"].get(platform, RULES["forward"][None])
    return rule.__module__.rpartition(".")[2]


def adder_conv(
    x: jax.Array,
    w: jax.Array,
    *,
    strides=(1, 1),
    padding="SAME",
    kernel_dilation=(1, 1),
    feature_group_count: int = 1,
    input_gradient: str = "hardtanh",
) -> jax.Array:
    """Adder convolution: negative L1 distance between patches and filters.

        y[n,i,j,o] = -sum_{u,v,c} |x[n, i*s+u-p, j*s+v-p, c] - w[u,v,c,o]|

    Its VJP is a surrogate, not the derivative:

        dw = sum over places of dy * (x - w)
        dx = sum over filters of dy * clip(w - x, -1, 1)

    Zero padding is not neutral: a padded place adds -|w|.

    Args:
      x: `[batch, height, width, c_in]`, float32, bfloat16 or float16.
      w: `[kh, kw, c_in / feature_group_count, c_out]`, likewise.
      strides: an int, or one for rows and one for columns.
      padding: "SAME" and "VALID" as XLA defines them, an int, or a `(low, high)` pair a dimension.
      kernel_dilation: distance between neighbouring taps, an int or two.
      feature_group_count: number of groups; `c_in` makes the layer depthwise.
      input_gradient: "hardtanh" as above; "sign" (the L1 derivative) or "full" (`w - x`, the
        derivative of half the squared L2 distance) for ablations.
    Returns:
      `[batch, height', width', c_out]`, dtype of `x`, every value <= 0; sums are float32.
    Raises:
      ValueError: if shapes or dtypes do not fit or an argument is out of range; the message prints
        them.
    References:
      Chen et al., AdderNet, CVPR 2020, Eqs. 1, 5, 6.
    """
    if not {x.dtype, w.dtype} <= DTYPES:
        raise ValueError(
            f"{x.dtype=}, {w.dtype=}: expected float32, bfloat16 or float16; cast with .astype"
        )
    geometry = geometry_lib.resolve(
        x.shape, w.shape, strides, padding, kernel_dilation, feature_group_count, input_gradient
    )
    # Under shard_map the primitives want operands that vary over the same mesh axes; the cast is
    # made here, outside the VJP, because its transpose is the sum over those axes.
    x, w = _vary_together(x, w)
    return _adder_conv(geometry, x, w)


def _vary_together(*arrays):
    axes = [geometry_lib.varying_axes(a) for a in arrays]
    union = frozenset().union(*axes)
    return tuple(
        lax.pcast(a, tuple(union - own), to="varying") if union - own else a
        for a, own in zip(arrays, axes, strict=True)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _adder_conv(geometry, x, w):
    return forward_p.bind(x, w, geometry=geometry)


def _adder_conv_fwd(geometry, x, w):
    return _adder_conv(geometry, x, w), (x, w)


def _adder_conv_bwd(geometry, residuals, dy):
    x, w = residuals
    dx = input_gradient_p.bind(x, w, dy, geometry=geometry)
    dw = weight_gradient_p.bind(x, w, dy, geometry=geometry)
    return dx, dw


_adder_conv.defvjp(_adder_conv_fwd, _adder_conv_bwd)


@functools.cache
def _compiled(primitive, geometry):
    return jax.jit(functools.partial(primitive.bind, geometry=geometry))


def _evaluate(primitive, *operands, geometry):
    with jax.disable_jit(False):  # under disable_jit the call would come back here for ever
        return _compiled(primitive, geometry)(*operands)


def _batch(primitive, operands, axes, *, geometry: Geometry):
    """Folds a vmapped axis into the images if the filters are shared, else into the groups."""
    name = primitive.name
    size = next(a.shape[d] for a, d in zip(operands, axes, strict=True) if d is not None)
    shared = axes[1] is None and name != "adder_weight_gradient"

    def fold(array, axis, target):
        # A gradient's images and filters must be as many as its cotangent's: broadcast.
        array = (
            jnp.broadcast_to(array[None], (size, *array.shape))
            if axis is None
            else jnp.moveaxis(array, axis, 0)
        )
        array = jnp.moveaxis(array, 0, target)
        return array.reshape(*array.shape[:target], -1, *array.shape[target + 2 :])

    def unfold(array, target):
        split = (*array.shape[:target], size, -1, *array.shape[target + 1 :])
        return array.reshape(split), target

    if shared:
        x, w, *rest = operands
        folded = [
            fold(x, axes[0], 0),
            w,
            *(fold(a, d, 0) for a, d in zip(rest, axes[2:], strict=True)),
        ]
        return unfold(primitive.bind(*folded, geometry=geometry), 0)
    folded = [fold(a, d, 3) for a, d in zip(operands, axes, strict=True)]
    wider = Geometry(**{**vars(geometry), "groups": geometry.groups * size})
    return unfold(primitive.bind(*folded, geometry=wider), 3)


def _primitive(rule: str, aval) -> Primitive:
    """Makes the primitive of one line of RULES; `aval(*operands, geometry)` is its result."""
    primitive = Primitive(f"adder_{rule}")

    def like_output(function):
        @functools.wraps(function)
        def cast(*operands, geometry):
            dtype = aval(*(jax.typeof(a) for a in operands), geometry=geometry).dtype
            return function(*operands, geometry).astype(dtype)

        return cast

    primitive.def_abstract_eval(aval)
    primitive.def_impl(functools.partial(_evaluate, primitive))
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
    for platform, function in RULES[rule].items():
        lowering = mlir.lower_fun(like_output(function), multiple_results=False)
        mlir.register_lowering(primitive, lowering, platform=platform)
    return primitive


forward_p = _primitive(
    "forward", lambda x, w, *, geometry: x.update(shape=geometry.output_shape(x.shape, w.shape))
)
input_gradient_p = _primitive("input_gradient", lambda x, w, dy, *, geometry: x)
weight_gradient_p = _primitive("weight_gradient", lambda x, w, dy, *, geometry: w)
