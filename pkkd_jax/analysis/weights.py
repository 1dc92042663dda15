"""How a network's weights are distributed: Gauss or Laplace, layer by layer."""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np
from flax import traverse_util

from pkkd_jax.analysis.run import Network
from pkkd_jax.names import UserError


@dataclasses.dataclass(frozen=True)
class Fit:
    """Maximum-likelihood fits of Gauss and Laplace to the same values, and which fits better.

    Attributes:
      mean, std: of the Gaussian.
      median, scale: of the Laplacian, `exp(-|x - median| / scale) / (2 scale)`.
      gauss, laplace: mean log-likelihood of a value, in nats.
      z: Vuong's statistic, standard normal where both are equally far from the truth; positive
        where the Laplacian is nearer.
      p: its two-sided probability.
    """

    mean: float
    std: float
    median: float
    scale: float
    gauss: float
    laplace: float
    z: float
    p: float

    @property
    def better(self) -> str:
        """ "laplace", "gauss", or "neither" where p is 0.05 or more."""
        if self.p >= 0.05:
            return "neither"
        return "laplace" if self.z > 0 else "gauss"


def fit(values: np.ndarray) -> Fit:
    """Fits both distributions to `values`, of any shape, and tests which is nearer to them.

        z = sqrt(n) mean(l) / std(l),   l = log laplace(x) - log gauss(x)

    Raises:
      UserError: for fewer than two different values.
    References:
      Vuong, Likelihood Ratio Tests for Model Selection and Non-Nested Hypotheses, Econometrica
      1989, for two models of as many parameters each.
    """
    from scipy import stats

    values = np.asarray(values, np.float64).ravel()
    if values.size < 2 or np.ptp(values) == 0:
        raise UserError(f"a fit to {values.size} values that are all equal: there must be others")
    mean, std = stats.norm.fit(values)
    median, scale = stats.laplace.fit(values)
    gauss = stats.norm.logpdf(values, mean, std)
    laplace = stats.laplace.logpdf(values, median, scale)
    z = np.sqrt(values.size) * (laplace - gauss).mean() / max((laplace - gauss).std(), 1e-300)
    found = mean, std, median, scale, gauss.mean(), laplace.mean(), z, 2 * stats.norm.sf(abs(z))
    return Fit(*map(float, found))


def filters(network: Network) -> dict[str, np.ndarray]:
    """Filters of a network's convolutions, of adder layers and of ordinary ones.

    Returns:
      Layer (its path in the parameters, with "/") -> `[kh, kw, c_in, c_out]`, the stem first and
      then by name.
    """
    flat = traverse_util.flatten_dict(network.variables["params"], sep="/")
    found = {
        path.rpartition("/")[0]: np.asarray(array)
        for path, array in flat.items()
        if path.rpartition("/")[2] in ("filters", "kernel") and array.ndim == 4
    }

    def place(layer):
        words = re.split(r"(\d+)", layer)
        return layer != "stem", [int(word) if word.isdigit() else word for word in words]

    return {layer: found[layer] for layer in sorted(found, key=place)}


def shared_layers(networks: Mapping[str, Mapping[str, np.ndarray]]) -> list[str]:
    """Layers that all of `networks`, label -> layer -> filters, have, in the order of the first."""
    first, *others = networks.values()
    return [layer for layer in first if all(layer in filters for filters in others)]
