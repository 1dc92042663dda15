"""Convolutions on CPUs: the calls of the C++ kernels in `native/`, or the portable form.

The kernels compute in float32; half-precision operands are cast, which costs less than the
arithmetic that a CPU would need for them.
"""

import ctypes
import functools
import importlib.metadata
import os

import jax
import jax.numpy as jnp
import numpy as np

from pkkd_jax.names import UserError
from pkkd_jax.ops import portable
from pkkd_jax.ops.geometry import Geometry

NATIVE = ("avx512", "avx2", "neon")
VARIABLE = "PKKD_JAX_ADDER"

# The order of `Body` in native/job.h.
BODIES = ("hardtanh", "sign", "full", "product")
MAX_TAPS = 256
MAX_COPY = 32 << 20  # bytes


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The library that the installation built, its handlers registered with XLA."""
    # Not beside this file: an editable installation leaves it among the installed packages.
    paths = [
        file.locate()
        for distribution in importlib.metadata.distributions(name="pkkd_jax")
        for file in distribution.files or ()
        if file.name.startswith("libpkkd_kernels.")
    ]
    if not paths:
        return None
    try:
        library = ctypes.CDLL(str(paths[0]))
    except OSError as error:
        raise UserError(
            f"the native kernels cannot be loaded: {error}; build them here with"
            " 'pip install --force-reinstall --no-cache-dir', or set PKKD_JAX_ADDER=portable"
        ) from error
    for name in ("forward", "input_gradient", "weight_gradient"):
        handler = jax.ffi.pycapsule(getattr(library, f"pkkd_{name}"))
        jax.ffi.register_ffi_target(f"pkkd_{name}", handler, platform="cpu")
    library.pkkd_select.restype = ctypes.c_char_p
    library.pkkd_select.argtypes = [ctypes.c_char_p]
    return library


@functools.cache
def selected() -> str:
    """The instruction set in use, "portable" if none: the best, or what PKKD_JAX_ADDER names.

    Raises:
      UserError: if PKKD_JAX_ADDER names what is unknown, was not built or cannot run here.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "portable", *NATIVE):
        raise UserError(f"{VARIABLE}={wanted}: it must be one of {', '.join(NATIVE)}, portable")
    library = None if wanted == "portable" else _library()
    if wanted == "portable" or (library is None and not wanted):
        return "portable"
    if library is None:
        raise UserError(
            f"{VARIABLE}={wanted}: this installation has no native kernels; install again where"
            " there is a C++ compiler, with PKKD_JAX_REQUIRE_NATIVE=1 and --no-cache-dir to see"
            " what is wrong"
        )
    name = library.pkkd_select(wanted.encode() if wanted else None)
    if name is None and wanted:
        raise UserError(
            f"{VARIABLE}={wanted}: this processor cannot run it; unset the variable for the best"
            " that it can"
        )
    return name.decode() if name else "portable"


def _serves(geometry: Geometry, w_shape, *shapes) -> bool:
    """Whether the kernels take filters of `w_shape` with images and responses of `shapes`."""
    if selected() == "portable" or any(0 in s for s in (w_shape, *shapes)):
        return False
    # What a row of responses sees is copied, with all that lies between dilated taps.
    extent = [(taps - 1) * d + 1 for taps, d in zip(w_shape[:2], geometry.dilation, strict=True)]
    seen = max(extent[0] * (s[2] + extent[1]) * s[3] for s in shapes)
    return w_shape[0] * w_shape[1] <= MAX_TAPS and 4 * seen <= MAX_COPY


def _call(handler: str, body: str, geometry: Geometry, shape, *operands) -> jax.Array:
    (top, _), (left, _) = geometry.padding
    numbers = (*geometry.strides, *geometry.dilation, top, left, geometry.groups)
    call = jax.ffi.ffi_call(f"pkkd_{handler}", jax.ShapeDtypeStruct(shape, jnp.float32))
    return call(
        *(a.astype(jnp.float32) for a in operands),
        geometry=np.array([*numbers, BODIES.index(body)], np.int64),
    )


def forward(x: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
    """`portable.forward`."""
    shape = geometry.output_shape(x.shape, w.shape)
    if not _serves(geometry, w.shape, x.shape, shape):
        return portable.forward(x, w, geometry)
    return _call("forward", geometry.input_gradient, geometry, shape, x, w)


def input_gradient(x: jax.Array, w: jax.Array, dy: jax.Array, geometry: Geometry) -> jax.Array:
    """`portable.input_gradient`."""
    if not _serves(geometry, w.shape, x.shape, dy.shape):
        return portable.input_gradient(x, w, dy, geometry)
    return _call("input_gradient", geometry.input_gradient, geometry, x.shape, x, w, dy)


def weight_gradient(x: jax.Array, w: jax.Array, dy: jax.Array, geometry: Geometry) -> jax.Array:
    """`portable.weight_gradient`."""
    if not _serves(geometry, w.shape, x.shape, dy.shape):
        return portable.weight_gradient(x, w, dy, geometry)
    return _call("weight_gradient", geometry.input_gradient, geometry, w.shape, x, w, dy)


def product_forward(x: jax.Array, w: jax.Array, geometry: Geometry, precision) -> jax.Array:
    """`portable.product_forward`."""
    shape = geometry.output_shape(x.shape, w.shape)
    if not _serves(geometry, w.shape, x.shape, shape):
        return portable.product_forward(x, w, geometry, precision)
    return _call("forward", "product", geometry, shape, x, w)


# A gradient of a product does not read the operand that it is the gradient of: dy stands there.


def product_input_gradient(
    w: jax.Array, dy: jax.Array, geometry: Geometry, precision, shape
) -> jax.Array:
    """`portable.product_input_gradient`."""
    if not _serves(geometry, w.shape, shape, dy.shape):
        return portable.product_input_gradient(w, dy, geometry, precision, shape)
    return _call("input_gradient", "product", geometry, shape, dy, w, dy)


def product_weight_gradient(
    x: jax.Array, dy: jax.Array, geometry: Geometry, precision, shape
) -> jax.Array:
    """`portable.product_weight_gradient`."""
    if not _serves(geometry, shape, x.shape, dy.shape):
        return portable.product_weight_gradient(x, dy, geometry, precision, shape)
    return _call("weight_gradient", "product", geometry, shape, x, dy, dy)
