"""Networks, one file a family.

A model is what a module in here lists in its `__all__`: called with keywords, it returns a Linen
module with the fields of `pkkd_jax.nn.Network`, and `model.apply(variables, images, train=...)`
returns `Outputs`. A user's own model, named by its dotted path, needs no more than that.
"""

import inspect
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
    model = names.resolve(__name__, name, "model")
    parameters = dict(inspect.signature(model).parameters)
    if inspect.isclass(model) and issubclass(model, linen.Module):
        del parameters["parent"], parameters["name"]  # Linen's own, never a config's
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for keyword in kwargs.keys() - parameters.keys():
            raise names.unknown(f"keyword of {name},", keyword, parameters)
    for keyword, p in parameters.items():
        required = p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        if required and keyword not in kwargs:
            raise names.UserError(f"{name} needs {keyword}=...; it takes: {', '.join(parameters)}")
    return model(**kwargs)
