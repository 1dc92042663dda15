"""Networks, one file a family.

A model is what a module in here lists in its `__all__`: called with keywords, it returns a Linen
module with the fields of `pkkd_jax.nn.Network`, and `model.apply(variables, images, train=...)`
returns `Outputs`. A user's own model, named by its dotted path, needs no more than that.
"""

from typing import Any

from flax import linen

from pkkd_jax import names

__all__ = ["build"]


def build(name: str, **kwargs: Any) -> linen.Module:
    """Makes the model that a config calls `name`, with its keywords.

        build("resnet_cifar", depth=20, num_classes=10, conv="adder")

    Raises:
      UserError: if there is no such model, or it does not take these keywords.
    """
    return names.call(__name__, name, "model", **kwargs)
