"""VGG-small: six 3x3 convolutions for small images."""

from flax import linen
from jax import Array

from pkkd_jax.nn import Network, Outputs, check_images, max_pool

__all__ = ["vgg_small"]


class VGGSmall(Network):
    """VGG-small: 128-128-pool-256-256-pool-512-512-pool-classifier, BatchNorm after each."""

    @linen.compact
    def __call__(self, images: Array, *, train: bool) -> Outputs:
        check_images(images, 8)
        ordinary, conv, norm, activation = self.layers(train)
        features, x = {}, images
        for i, width in enumerate((128, 128, 256, 256, 512, 512)):
            name, layer = (f"conv{i}", conv) if i else ("stem", ordinary)
            x = features[name] = layer(
                features=width, kernel_size=(3, 3), strides=(1, 1), padding=1, name=name
            )(x)
            x = features[f"{name}.out"] = activation(norm(name=f"{name}_bn")(x))
            if i % 2:
                x = max_pool(x)
        return self.classify(x.reshape(len(x), -1), features, train=train)


vgg_small = VGGSmall
