"""Handwritten digits of 8x8 pixels, from inside scikit-learn."""

import numpy as np

from pkkd_jax.data import arrays

__all__ = ["digits"]


def digits(split: str = "train", data_dir: str = "", augmentation: str = "none"):
    """1,797 grey 8x8 images of ten digits: 1,437 to train, 360 to test, in fixed shares a class.

    Args:
      split: "train" or "test".
      data_dir: not used; the data set is part of scikit-learn.
      augmentation: "none" or "crop_flip".
    """
    del data_dir
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    images = np.minimum(found.images * 16, 255).astype(np.uint8)[..., None]
    parts = train_test_split(
        images, found.target.astype(np.int32), test_size=0.2, random_state=0, stratify=found.target
    )
    images, labels = parts[split == "test"], parts[2 + (split == "test")]
    # Mean and standard deviation of the training images.
    return arrays.ArraySource(images, labels, 10, (78.1,), (96.1,), augmentation)
