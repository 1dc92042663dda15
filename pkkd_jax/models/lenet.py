"""LeNet-5 with BatchNorm, for images of handwritten digits."""

from flax import linen
from jax import Array

from pkkd_jax.names import UserError
from pkkd_jax.nn import Network, Outputs, max_pool

__all__ = ["lenet5"]


class LeNet5(Network, kw_only=True):
    """LeNet-5: 5x5 convolutions 6-pool-16-pool-120 and a 1x1, BatchNorm after each, classifier.

    Attributes:
      penultimate_features: channels of the 1x1 convolution, the classifier's input.
    References:
      LeCun et al., Gradient-Based Learning Applied to Document Recognition, 1998, Section II.B.
    """

    penultimate_features: int = 84

    @linen.compact
    def __call__(self, images: Array, *, train: bool) -> Outputs:
        if images.ndim != 4 or images.shape[1:3] not in ((28, 28), (32, 32)):
            raise UserError(
                f"images of shape {images.shape}: lenet5 takes [batch, height, width, channels]"
                " of 28x28 or 32x32; resize the images or choose resnet_cifar"
            )
        ordinary, conv, norm, activation = self.layers(train)
        plan = [
            ("stem", ordinary, 6, 5, 2 if images.shape[1] == 28 else 0),
            ("conv1", conv, 16, 5, 0),
            ("conv2", conv, 120, 5, 0),
            ("conv3", conv, self.penultimate_features, 1, 0),
        ]
        features, x = {}, images
        for name, layer, width, size, padding in plan:
            x = features[name] = layer(
                features=width,
                kernel_size=(size, size),
                strides=(1, 1),
                padding=padding,
                name=name,
            )(x)
            x = features[f"{name}.out"] = activation(norm(name=f"{name}_bn")(x))
            if name in ("stem", "conv1"):
                x = max_pool(x)
        return self.classify(x.reshape(len(x), -1), features, train=train)


lenet5 = LeNet5
