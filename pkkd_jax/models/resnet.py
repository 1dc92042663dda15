"""Residual networks: the CIFAR family of depth 6n + 2 and the ImageNet family."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen
from jax import Array

from pkkd_jax.names import UserError
from pkkd_jax.nn import Network, Outputs, check_images

__all__ = ["resnet_cifar", "resnet_imagenet"]

# Depth to number of blocks in each stage.
IMAGENET = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def resnet_cifar(
    *,
    num_classes: int,
    depth: int = 20,
    width_multiplier: float = 1.0,
    conv: str = "conv",
    bn_axis_name: str | None = None,
    dtype: Any = jnp.float32,
    dropout: float = 0.0,
) -> "ResNet":
    """ResNet for small images: 3x3 stem of 16, stages 16-32-64, a classifier without bias.

    The stem has `width_multiplier` times as many channels, rounded, and all others with it.

    Raises:
      UserError: if `depth` is not 6n + 2; for a `width_multiplier` that leaves no channel.
    References:
      He et al., Deep Residual Learning, CVPR 2016, Section 4.2.
    """
    if depth < 8 or depth % 6 != 2:
        below = max(8, depth - (depth - 2) % 6)
        near = f"{below} or {below + 6}" if depth > 8 else "8"
        raise UserError(f"depth {depth} of resnet_cifar is not 6n + 2; the nearest: {near}")
    return ResNet(
        stage_sizes=((depth - 2) // 6,) * 3,
        width=_width(16, width_multiplier),
        classifier_bias=False,
        num_classes=num_classes,
        conv=conv,
        bn_axis_name=bn_axis_name,
        dtype=dtype,
        dropout=dropout,
    )


def resnet_imagenet(
    *,
    num_classes: int,
    depth: int = 18,
    width_multiplier: float = 1.0,
    conv: str = "conv",
    bn_axis_name: str | None = None,
    dtype: Any = jnp.float32,
    dropout: float = 0.0,
) -> "ResNet":
    """ResNet for large images: 7x7 stem of 64, max-pool, stages 64-128-256-512 (x4 if depth >= 50).

    The stem has `width_multiplier` times as many channels, rounded, and all others with it.

    Raises:
      UserError: if `depth` is none of 18, 34, 50, 101, 152; for a `width_multiplier` that leaves no
        channel.
    References:
      He et al., Deep Residual Learning, CVPR 2016, Table 1; the stride is in the 3x3 convolution.
    """
    if depth not in IMAGENET:
        allowed = ", ".join(map(str, IMAGENET))
        raise UserError(f"depth {depth} of resnet_imagenet is unknown; allowed: {allowed}")
    return ResNet(
        stage_sizes=IMAGENET[depth],
        width=_width(64, width_multiplier),
        bottleneck=depth >= 50,
        large_stem=True,
        num_classes=num_classes,
        conv=conv,
        bn_axis_name=bn_axis_name,
        dtype=dtype,
        dropout=dropout,
    )


def _width(channels: int, multiplier: float) -> int:
    if not 1 <= channels * multiplier <= 2**16:
        raise UserError(
            f"width_multiplier={multiplier} of a network whose stem has {channels} channels: they"
            f" must become 1 to 65,536; choose {1 / channels:g} or more"
        )
    return round(channels * multiplier)


class Block(linen.Module):
    """Residual block: conv-bn-relu-conv-bn-add-relu, with a convolution more if `bottleneck`.

    Called on `[batch, height, width, c]`, it returns the block's output and its taps, that output
    among them as "out".
    """

    features: int
    strides: int
    bottleneck: bool
    conv: Callable
    norm: Callable
    activation: Callable

    @linen.compact
    def __call__(self, x: Array) -> tuple[Array, dict[str, Array]]:
        shapes = [(3, self.features, self.strides), (3, self.features, 1)]
        if self.bottleneck:
            shapes = [(1, self.features, 1), shapes[0], (1, 4 * self.features, 1)]
        taps = {}

        def conv_norm(x, name, size, features, strides):
            conv = self.conv(
                features=features,
                kernel_size=(size, size),
                strides=(strides, strides),
                padding=size // 2,  # not "SAME", which pads one side more where it strides
                name=name,
            )
            taps[name] = conv(x)
            return self.norm(name=f"{name}_bn")(taps[name])

        y = x
        for i, shape in enumerate(shapes, 1):
            y = conv_norm(self.activation(y) if i > 1 else y, f"conv{i}", *shape)
        if x.shape != y.shape:
            x = conv_norm(x, "shortcut", 1, y.shape[-1], self.strides)
        taps["out"] = self.activation(x + y)
        return taps["out"], taps


class ResNet(Network, kw_only=True):
    """Stem, stages of residual blocks, average pool, classifier.

    Attributes:
      stage_sizes: number of blocks in each stage.
      width: channels of the stem and of the first stage; every further stage has twice as many.
      bottleneck: whether blocks are 1x1, 3x3, 1x1 instead of two 3x3.
      large_stem: 7x7 convolution and max-pool, a stride of 2 each, instead of a 3x3 convolution.
      classifier_bias: whether the classifier has a bias.
    """

    stage_sizes: Sequence[int]
    width: int
    bottleneck: bool = False
    large_stem: bool = False
    classifier_bias: bool = True

    @linen.compact
    def __call__(self, images: Array, *, train: bool) -> Outputs:
        check_images(images, 2 ** (len(self.stage_sizes) - 1) * (4 if self.large_stem else 1))
        ordinary, conv, norm, activation = self.layers(train)
        size, strides = (7, 2) if self.large_stem else (3, 1)
        x = ordinary(self.width, (size, size), strides, padding=size // 2, name="stem")(images)
        features = {"stem": x}
        x = features["stem.out"] = activation(norm(name="stem_bn")(x))
        if self.large_stem:
            x = linen.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, blocks in enumerate(self.stage_sizes, 1):
            for block in range(1, blocks + 1):
                x, taps = Block(
                    features=self.width * 2 ** (stage - 1),
                    strides=2 if stage > 1 and block == 1 else 1,
                    bottleneck=self.bottleneck,
                    conv=conv,
                    norm=norm,
                    activation=activation,
                    name=f"stage{stage}_block{block}",
                )(x)
                features |= {f"stage{stage}.block{block}.{tap}": y for tap, y in taps.items()}
        x = x.mean(axis=(1, 2))
        return self.classify(x, features, train=train, use_bias=self.classifier_bias)
