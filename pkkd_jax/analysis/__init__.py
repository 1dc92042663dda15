"""What a run's networks have learnt: features in kernel space, weights, similarity, and pictures.

    run = analysis.load("runs/resnet20")
    images, labels = analysis.examples(run, 256)
    stages = analysis.responses(run, images)
    analysis.linear_cka(stages["rho"]["student"][tap], stages["rho"]["teacher"][tap])

Everything returns plain arrays; `analysis.plots` draws them.
"""

from pkkd_jax.analysis import plots
from pkkd_jax.analysis.events import write as write_events
from pkkd_jax.analysis.features import (
    along,
    linear_shares,
    penultimate,
    responses,
    sigma_history,
    similarities,
    zero_shares,
)
from pkkd_jax.analysis.run import Network, Run, examples, load, normalised, of_state
from pkkd_jax.analysis.similarity import (
    cka,
    effective_rank,
    embedding,
    linear_cka,
    linear_gram,
    rbf_cka,
    rbf_gram,
    variance,
)
from pkkd_jax.analysis.weights import Fit, filters, fit, shared_layers
from pkkd_jax.checkpoint import saved_steps

__all__ = [
    "Fit",
    "Network",
    "Run",
    "along",
    "cka",
    "effective_rank",
    "embedding",
    "examples",
    "filters",
    "fit",
    "linear_cka",
    "linear_gram",
    "linear_shares",
    "load",
    "normalised",
    "of_state",
    "penultimate",
    "plots",
    "rbf_cka",
    "rbf_gram",
    "responses",
    "saved_steps",
    "shared_layers",
    "sigma_history",
    "similarities",
    "variance",
    "write_events",
    "zero_shares",
]
