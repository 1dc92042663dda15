"""Layers: what the models, and a user's own, are made of."""

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen
from jax import Array, lax

from pkkd_jax import names
from pkkd_jax.ops import binary
from pkkd_jax.ops.adder import adder_conv
from pkkd_jax.ops.batch_norm import batch_norm
from pkkd_jax.ops.conv import conv_general_dilated


@flax.struct.dataclass
class Outputs:
    """What every network returns.

    Attributes:
      logits: `[batch, num_classes]`, float32.
      features: tap name -> raw output of that convolution before BatchNorm, `[batch, height, width,
        channels]`, in forward order; with "out" behind a layer's or a block's name, what it hands
        on; `penultimate` is the classifier's input, `[batch, channels]`.
    """

    logits: Array
    features: dict[str, Array]

    def __post_init__(self):
        # JAX sorts the keys of a dict, and keeps the order of an OrderedDict.
        if type(self.features) is dict:
            object.__setattr__(self, "features", OrderedDict(self.features))


def _refused(module: linen.Module, field: str, allowed: str, instead: str = "Conv") -> ValueError:
    return ValueError(
        f"{type(module).__name__}: {field}={getattr(module, field)!r}; allowed: {allowed};"
        f" use flax.linen.{instead} where you need it"
    )


class AdderConv(linen.Module):
    """Adder convolution, `-sum |patch - filter|` with surrogate gradients, see `ops.adder`.

    The fields are those of `flax.linen.Conv`; what has no meaning for an adder is refused unless
    left at its default. An int `kernel_size` is square. The parameter is named `filters`, by which
    `optim.scale_by_adder_norm` knows it. Let BatchNorm follow: no response is positive.

    Attributes:
      features: number of filters.
      kernel_size, strides, kernel_dilation: an int or (height, width).
      padding: "SAME", "VALID", an int, or for each dimension an int or a (low, high) pair.
      feature_group_count: groups, each of which sees its share of the channels only.
      use_bias, bias_init: whether a bias is added, and its start.
      kernel_init: of the filters, N(0, 1).
      dtype: of the computation; None infers it from input and parameters.
      param_dtype: of the parameters.
      promote_dtype: brings input, filters and bias to one dtype.
      input_dilation, mask, precision, conv_general_dilated(_cls): their defaults only.
      input_gradient: surrogate for the gradient of the input, "hardtanh", "sign" or "full".
    Raises:
      ValueError: for a field that it cannot honour; the message prints it.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] | None = 1
    padding: str | int | Sequence[int | tuple[int, int]] = "SAME"
    input_dilation: int | Sequence[int] | None = 1
    kernel_dilation: int | Sequence[int] | None = 1
    feature_group_count: int = 1
    use_bias: bool = True
    mask: Array | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Callable = linen.initializers.normal(stddev=1.0)
    bias_init: Callable = linen.initializers.zeros_init()
    promote_dtype: Callable = linen.dtypes.promote_dtype
    conv_general_dilated: Callable | None = None
    conv_general_dilated_cls: Any = None
    input_gradient: str = "hardtanh"

    def __post_init__(self):
        super().__post_init__()
        if self.input_dilation not in (None, 1, (1, 1), [1, 1]):
            raise _refused(self, "input_dilation", "1")
        if self.precision not in (None, "default", lax.Precision.DEFAULT):
            raise _refused(self, "precision", "None, since the operation only adds")
        for argument in ("mask", "conv_general_dilated", "conv_general_dilated_cls"):
            if getattr(self, argument) is not None:
                raise _refused(self, argument, "None")

    @linen.compact
    def __call__(self, inputs: Array) -> Array:
        """Maps `[*batch, height, width, c_in]` to `[*batch, height', width', features]`."""
        size = self.kernel_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        if len(size) != 2 or min(size) < 1:
            raise _refused(self, "kernel_size", "a positive int or two, (height, width)")
        if self.feature_group_count < 1:
            raise _refused(self, "feature_group_count", "1 or more")
        shape = (*size, inputs.shape[-1] // self.feature_group_count, self.features)
        filters = self.param("filters", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        x, filters, bias = self.promote_dtype(inputs, filters, bias, dtype=self.dtype)
        batch = x.shape[:-3]
        y = adder_conv(
            x.reshape(math.prod(batch), *x.shape[-3:]),
            filters,
            strides=1 if self.strides is None else self.strides,
            padding=self.padding,
            kernel_dilation=1 if self.kernel_dilation is None else self.kernel_dilation,
            feature_group_count=self.feature_group_count,
            input_gradient=self.input_gradient,
        )
        y = y.reshape(*batch, *y.shape[1:])
        return y if bias is None else y + bias


class Conv(linen.Conv):
    """`flax.linen.Conv` with `pkkd_jax.ops.conv`, which has faster kernels on CPUs."""

    conv_general_dilated: Callable | None = conv_general_dilated


class BinaryConv(Conv):
    """`flax.linen.Conv` with `pkkd_jax.ops.binary.binary_conv`: signs of inputs and filters.

    The sign is the nonlinearity: networks of the package leave ReLU out, of which it would see
    nothing but 1. The kernel starts from N(0, 0.01^2): only signs count, and of the smaller the
    more are turned by a step. (XNOR-Net's published code multiplies their gradient.)
    """

    conv_general_dilated: Callable | None = binary.binary_conv
    kernel_init: Callable = linen.initializers.normal(stddev=0.01)
    activation = staticmethod(lambda x: x)


class PCNNConv(BinaryConv):
    """`BinaryConv` with `pkkd_jax.ops.binary.ProjectionConv` as its operation."""

    conv_general_dilated_cls: Any = binary.ProjectionConv


class BatchNorm(linen.BatchNorm):
    """`flax.linen.BatchNorm` over the last axis, with fewer passes over memory in training.

    `use_fast_variance` and `force_float32_reductions` are left aside: the variance is as exact as
    without the one, and as fast as with it; sums are float32.

    Raises:
      ValueError: for a field that it cannot honour; the message prints it.
    """

    def __post_init__(self):
        super().__post_init__()
        for field in ("axis", "axis_index_groups", "use_bias", "use_scale"):
            default = type(self).__dataclass_fields__[field].default
            if getattr(self, field) != default:
                raise _refused(self, field, repr(default), "BatchNorm")

    @linen.compact
    def __call__(self, x: Array, use_running_average: bool | None = None) -> Array:
        """Normalises `[..., channels]`."""
        average = linen.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        var = self.variable("batch_stats", "var", jnp.ones, shape)
        scale = self.param("scale", self.scale_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, shape, self.param_dtype)
        if average:
            y = (x - mean.value) * (lax.rsqrt(var.value + self.epsilon) * scale) + bias
        else:
            axis = None if self.is_initializing() else self.axis_name
            y, *found = batch_norm(x, scale, bias, self.epsilon, axis)
            if not self.is_initializing():
                for running, new in zip((mean, var), found, strict=True):
                    running.value = self.momentum * running.value + (1 - self.momentum) * new
        return y.astype(self.dtype or x.dtype)


CONVOLUTIONS = {"conv": Conv, "adder": AdderConv, "binary": BinaryConv, "pcnn": PCNNConv}


def convolution(name: str) -> Callable[..., linen.Module]:
    """The convolution that a model's field `conv` names.

    Args:
      name: "conv", "adder", "binary" (XNOR-Net), "pcnn", or the dotted path of a user's own,
        called with the keywords of `linen.Conv`; its attribute `activation`, if there, replaces
        ReLU.
    Raises:
      UserError: if there is no such name, or what it names cannot be called so.
    """
    if "." in name:
        layer = names.resolve(__package__, name, "convolution")
        try:
            inspect.signature(layer).bind_partial(features=1, kernel_size=(1, 1))
        except (TypeError, ValueError) as error:
            raise names.UserError(
                f"convolution {name!r} is not called as linen.Conv is ({error}): name a layer with"
                " its keywords, features, kernel_size and so on"
            ) from error
        return layer
    if name not in CONVOLUTIONS:
        raise names.unknown("convolution", name, CONVOLUTIONS)
    return CONVOLUTIONS[name]


class Network(linen.Module):
    """What the package's models share: fields, layers and classifier.

    Attributes:
      num_classes: number of logits.
      conv: name of the convolution in every place but the first, see `convolution`.
      bn_axis_name: device axis over which BatchNorm's batch statistics are averaged.
      dtype: of the computation; the logits are float32 in any case.
      dropout: rate before the classifier, in training only; needs a "dropout" key where not 0.
    """

    num_classes: int
    conv: str = "conv"
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    dropout: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        convolution(self.conv)
        if not 0 <= self.dropout < 1:
            raise names.UserError(f"dropout={self.dropout}: it must be from 0 (off) to below 1")

    def layers(self, train: bool) -> tuple[Callable, Callable, Callable, Callable]:
        """Makers of the ordinary convolution, the swapped one and BatchNorm, and the activation."""
        he_normal = linen.initializers.variance_scaling(2.0, "fan_out", "normal")
        shared = {"use_bias": False, "dtype": self.dtype}
        ordinary = partial(Conv, kernel_init=he_normal, **shared)
        swapped = convolution(self.conv)
        activation = getattr(swapped, "activation", linen.relu)
        swapped = ordinary if swapped is Conv else partial(swapped, **shared)
        norm = partial(
            BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            axis_name=self.bn_axis_name,
        )
        return ordinary, swapped, norm, activation

    def classify(
        self, x: Array, features: dict[str, Array], *, train: bool, use_bias: bool = True
    ) -> Outputs:
        """Classifier with BatchNorm on the logits, on `x` of `[batch, channels]`."""
        norm = self.layers(train)[2]
        dropped = linen.Dropout(self.dropout, deterministic=not train)(x)
        logits = linen.Dense(
            self.num_classes, use_bias=use_bias, dtype=self.dtype, name="classifier"
        )(dropped)
        logits = norm(dtype=jnp.float32, name="classifier_bn")(logits)
        return Outputs(logits, {**features, "penultimate": x})


def max_pool(x: Array) -> Array:
    """Halves height and width."""
    return linen.max_pool(x, (2, 2), (2, 2))


def check_images(images: Array | jax.ShapeDtypeStruct, smallest: int) -> None:
    """Refuses what is not a batch of images of at least `smallest` pixels a side."""
    if len(images.shape) != 4 or min(images.shape[1:3]) < smallest:
        raise names.UserError(
            f"images of shape {images.shape}: this network takes [batch, height, width, channels]"
            f" with height and width at least {smallest}, or its strides leave no pixel;"
            " resize the images or choose a network with fewer strides"
        )
