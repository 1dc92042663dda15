"""The order in which a training visits its examples."""

import functools

import numpy as np


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_examples)


def example_indices(seed: int, num_examples: int, positions: np.ndarray) -> np.ndarray:
    """Examples at `positions` of the training stream, which visits each once in every epoch.

    Position p is element `p % num_examples` of the permutation of epoch `p // num_examples`;
    batches may cross the border of epochs.
    """
    positions = np.asarray(positions)
    epochs, places = np.divmod(positions, num_examples)
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = _permutation(seed, int(epoch), num_examples)[places[here]]
    return indices
