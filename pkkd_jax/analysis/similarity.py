"""How alike two sets of features of the same examples are, and how many directions one uses."""

from collections.abc import Mapping

import numpy as np

from pkkd_jax.names import UserError


def rows(features: np.ndarray) -> np.ndarray:
    """float64 `[n, d]`: the features of each of `n` examples, `[n, ...]`, as one centred vector."""
    flat = np.asarray(features, np.float64).reshape(len(features), -1)
    return flat - flat.mean(0)


def linear_gram(features: np.ndarray) -> np.ndarray:
    """`[n, n]`: inner products of centred features of `n` examples, `[n, ...]`."""
    flat = rows(features)
    return flat @ flat.T


def rbf_gram(features: np.ndarray, width: float = 1.0) -> np.ndarray:
    """`[n, n]`: `exp(-d^2 / (2 (width m)^2))`, d the distances between examples, m their median.

    Args:
      features: `[n, ...]`.
      width: of the kernel, in medians of the distance between two examples.
    """
    gram = linear_gram(features)
    squares = np.maximum(np.diag(gram)[:, None] + np.diag(gram) - 2 * gram, 0)
    median = np.median(squares[np.triu_indices(len(gram), 1)])
    return np.exp(-squares / (2 * width**2 * max(median, 1e-300)))


def alignment(a: np.ndarray, b: np.ndarray) -> float:
    """Centred kernel alignment of two Gram matrices, `[n, n]`; 0 where one of them is constant.

        CKA = <HaH, HbH> / (|HaH| |HbH|),   H = 1 - 1/n

    Of few examples it is too high: compare values of as many.

    References:
      Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019, Eq. 1-4.
    """
    a, b = _centred(a), _centred(b)
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return float((a * b).sum() / size) if size > 0 else 0.0


def _centred(gram: np.ndarray) -> np.ndarray:
    return gram - gram.mean(0) - gram.mean(1, keepdims=True) + gram.mean()


def linear_cka(a: np.ndarray, b: np.ndarray) -> float:
    """Linear CKA, in [0, 1], of features `[n, ...]` and `[n, ...]` of the same examples."""
    return float(cka({"": a}, {"": b})[0, 0])


def rbf_cka(a: np.ndarray, b: np.ndarray, width: float = 1.0) -> float:
    """CKA, in [0, 1], of features `[n, ...]` under Gaussian kernels, see `rbf_gram`."""
    return float(cka({"": a}, {"": b}, lambda features: rbf_gram(features, width))[0, 0])


def cka(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], gram=linear_gram) -> np.ndarray:
    """CKA of every pair of features.

    Args:
      a: name to features `[n, ...]`.
      b: likewise, of the same examples.
      gram: features to `[n, n]`, such as `linear_gram` or `rbf_gram`.
    Returns:
      float64 `[len(a), len(b)]`.
    Raises:
      UserError: if they are not of equally many examples.
    """
    counts = {name: len(features) for each in (a, b) for name, features in each.items()}
    if len(set(counts.values())) > 1:
        raise UserError(f"CKA compares features of the same examples, and these are of {counts}")
    grams_a = [gram(features) for features in a.values()]
    grams_b = grams_a if a is b else [gram(features) for features in b.values()]
    return np.array([[alignment(x, y) for y in grams_b] for x in grams_a])


def effective_rank(features: np.ndarray) -> float:
    """Participation ratio `tr(C)^2 / tr(C^2)` of the channels' covariance C, in [1, channels]; 0 if
    they are constant.

    Args:
      features: `[..., channels]`.
    """
    covariance = _covariance(features)
    return float(np.trace(covariance) ** 2 / max(np.square(covariance).sum(), 1e-300))


def variance(features: np.ndarray) -> float:
    """Variance over examples and places, mean over the channels of `[..., channels]`."""
    return float(np.diag(_covariance(features)).mean())


def _covariance(features: np.ndarray) -> np.ndarray:
    flat = rows(np.reshape(features, (-1, features.shape[-1])))
    return flat.T @ flat / len(flat)


def embedding(features: np.ndarray, method: str = "pca") -> np.ndarray:
    """Two coordinates for each of `n` examples.

    Args:
      features: `[n, ...]`; if they are two already they are returned as they are, and if they are
        constant, zeros.
      method: "pca", the first two principal components, or "tsne", by scikit-learn.
    Returns:
      float64 `[n, 2]`.
    Raises:
      UserError: for another method, for too few examples, or for features that are not finite.
    """
    flat = np.asarray(features, np.float64).reshape(len(features), -1)
    if flat.shape[1] == 2:
        return flat
    if len(flat) < 4:
        raise UserError(f"an embedding of {len(flat)} examples: at least 4 are needed")
    if method not in ("pca", "tsne"):
        raise UserError(f"{method=}: expected 'pca' or 'tsne'")
    if not np.isfinite(flat).all():
        raise UserError("an embedding of features that are not finite: look at an earlier step")
    found = np.zeros((len(flat), 2))
    varying = flat[:, np.ptp(flat, 0) > 0]
    if varying.shape[1] < 2:  # for which scikit-learn has no answer, or ends the program
        found[:, : varying.shape[1]] = rows(varying)
    elif method == "pca":
        from sklearn.decomposition import PCA

        found[:] = PCA(2, random_state=0).fit_transform(varying)
    else:
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(flat) - 1) / 3)
        found[:] = TSNE(2, perplexity=perplexity, random_state=0).fit_transform(varying)
    return found
