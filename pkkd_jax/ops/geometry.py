"""The static arguments of an adder convolution, resolved to numbers."""

import dataclasses
from collections.abc import Sequence

import jax
from jax import lax

INPUT_GRADIENTS = ("hardtanh", "sign", "full")
Pair = tuple[int, int]
DIMENSIONS = ("NHWC", "HWIO", "NHWC")


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Where the patches are: hashable, so that it can be a parameter of a primitive.

    Attributes:
      strides: of rows and columns.
      padding: `((top, bottom), (left, right))`, in pixels of the input; may be negative.
      dilation: distance between neighbouring taps of a filter.
      groups: number of groups of channels that see each other.
      input_gradient: "hardtanh", "sign" or "full"; it means nothing to an ordinary convolution.
    """

    strides: Pair
    padding: tuple[Pair, Pair]
    dilation: Pair
    groups: int
    input_gradient: str

    def output_shape(self, x_shape: Sequence[int], w_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape `[batch, height', width', c_out]` of the response."""
        spatial = (
            max(0, (size + sum(pad) - (taps - 1) * dilation - 1) // stride + 1)
            for size, taps, stride, pad, dilation in zip(
                x_shape[1:3], w_shape[:2], self.strides, self.padding, self.dilation, strict=True
            )
        )
        return (x_shape[0], *spatial, w_shape[3])


def varying_axes(array: jax.Array) -> frozenset[str]:
    """Mesh axes over which `array` varies inside shard_map with check_vma; none elsewhere."""
    return getattr(getattr(jax.typeof(array), "manual_axis_type", None), "varying", frozenset())


def _pair(name: str, value) -> Pair:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(not isinstance(v, int) or v < 1 for v in pair):
        raise ValueError(f"{name}={value!r}: expected a positive int or two of them")
    return pair


def _padding(padding, sizes, taps, strides, dilation) -> tuple[Pair, Pair]:
    if isinstance(padding, str):
        if padding.upper() not in ("SAME", "VALID"):
            raise ValueError(
                f"{padding=}: expected 'SAME', 'VALID', an int, or a (low, high) pair per dimension"
            )
        extents = [(k - 1) * d + 1 for k, d in zip(taps, dilation, strict=True)]
        return tuple(map(tuple, lax.padtype_to_pads(sizes, extents, strides, padding.upper())))
    if isinstance(padding, int):
        padding = (padding, padding)
    pairs = tuple((p, p) if isinstance(p, int) else tuple(p) for p in padding)
    if len(pairs) != 2 or any(len(p) != 2 or not all(isinstance(v, int) for v in p) for p in pairs):
        raise ValueError(
            f"{padding=}: expected 'SAME', 'VALID', an int, or a (low, high) pair per dimension"
        )
    return pairs


def resolve(
    x_shape, w_shape, strides, padding, kernel_dilation, groups, input_gradient="full"
) -> Geometry:
    """Checks the arguments of a convolution against the shapes and fills in the padding.

    Raises:
      ValueError: for shapes that do not fit and arguments out of range; the message prints them.
    """
    if len(x_shape) != 4 or len(w_shape) != 4:
        raise ValueError(
            f"x.shape={tuple(x_shape)}, w.shape={tuple(w_shape)}:"
            " expected [batch, height, width, c_in] and [kh, kw, c_in / groups, c_out]"
        )
    if input_gradient not in INPUT_GRADIENTS:
        raise ValueError(f"{input_gradient=}: expected one of {', '.join(INPUT_GRADIENTS)}")
    if not isinstance(groups, int) or groups < 1 or w_shape[3] % groups:
        raise ValueError(
            f"feature_group_count={groups!r}: expected a positive divisor of c_out={w_shape[3]}"
        )
    if x_shape[3] != w_shape[2] * groups:
        raise ValueError(
            f"x.shape={tuple(x_shape)}, w.shape={tuple(w_shape)}, feature_group_count={groups}:"
            " x.shape[-1] must equal w.shape[2] * feature_group_count"
        )
    strides = _pair("strides", strides)
    dilation = _pair("kernel_dilation", kernel_dilation)
    pads = _padding(padding, x_shape[1:3], w_shape[:2], strides, dilation)
    return Geometry(strides, pads, dilation, groups, input_gradient)
