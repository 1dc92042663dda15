"""A teacher whose features a kernel turns into true Gaussians of patch and filter.

    python -m pkkd_jax.main --config=configs/resnet20.py:teacher=experiments.gaussian.resnet_cifar

PKKD's kernel of a convolution's response, exp(x * f / (2 sigma^2)), is a Gaussian only once the
norms of patches and filters are divided out. Here they are:

    z = -||x - f||^2 / 2 = x * f - (||x||^2 + ||f||^2) / 2      exp(z / (2 sigma^2))
"""

import jax.numpy as jnp
from flax import linen
from jax import Array, lax

from pkkd_jax import models
from pkkd_jax.models.resnet import ResNet
from pkkd_jax.nn import Outputs


def resnet_cifar(*, num_classes: int, depth: int = 20, dropout: float = 0.0, **fields) -> ResNet:
    """`pkkd_jax.models.resnet.resnet_cifar` with distances for responses, at convolutions only."""
    plain = models.build("resnet_cifar", num_classes=num_classes, depth=depth, dropout=dropout)
    return ResNetOfDistances(
        stage_sizes=plain.stage_sizes,
        width=plain.width,
        classifier_bias=plain.classifier_bias,
        num_classes=num_classes,
        dropout=dropout,
        **fields,
    )


class ResNetOfDistances(ResNet):
    """A ResNet that computes what it always does, and whose features are -||x - f||^2 / 2."""

    def __call__(self, images: Array, *, train: bool) -> Outputs:
        norms = {}

        def note(call, args, kwargs, context):
            response = call(*args, **kwargs)
            if isinstance(context.module, linen.Conv):
                tap = ".".join(context.module.path).replace("_", ".")
                norms[tap] = squared_norms(context.module, *args)
            return response

        with linen.intercept_methods(note):
            outputs = super().__call__(images, train=train)
        features = {tap: z - norms.get(tap, 0.0) / 2 for tap, z in outputs.features.items()}
        return Outputs(outputs.logits, features)


def squared_norms(conv: linen.Conv, x: Array) -> Array:
    """`[batch, height', width', filters]`: ||patch||^2 + ||filter||^2 of a convolution of `x`."""
    filters = conv.variables["params"]["kernel"]
    pad = (conv.padding, conv.padding)
    strides = (conv.strides,) * 2 if isinstance(conv.strides, int) else conv.strides
    patches = lax.reduce_window(
        jnp.square(x).sum(-1, keepdims=True),
        0.0,
        lax.add,
        (1, *conv.kernel_size, 1),
        (1, *strides, 1),
        ((0, 0), pad, pad, (0, 0)),
    )
    return patches + jnp.square(filters).sum((0, 1, 2))
