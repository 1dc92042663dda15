"""One example read with care, and the count of those that cannot be."""

import warnings

import numpy as np
from PIL import Image

from pkkd_jax.names import UserError


class Unreadable(ValueError):
    """An example that cannot be read; the message says why."""


def example(source, index: int) -> dict:
    """`source[index]`, decoded.

    Raises:
      Unreadable: if it cannot be.
      UserError: if it is not what a source is to return.
    """
    try:
        found = source[index]
        image, label = found["image"], found["label"]
        if isinstance(image, Image.Image):
            image.load()
        elif getattr(image, "dtype", None) != np.uint8 or image.ndim != 3:
            kind = (
                f"{image.dtype} {image.shape}" if hasattr(image, "dtype") else type(image).__name__
            )
            raise UserError(
                f"image {index} of the data set is {kind}: expected uint8 (height, width,"
                " channels), or a PIL image"
            )
        if not 0 <= label < source.num_classes:
            raise UserError(
                f"label {label} of example {index} of the data set: with its"
                f" num_classes={source.num_classes} expected from 0 to {source.num_classes - 1}"
            )
        return found
    except (UserError, MemoryError):
        raise
    except Exception as error:  # of many kinds, by format and damage
        text = " ".join(str(error).split())[:200]
        raise Unreadable(f"{type(error).__name__}: {text}") from error


class Damage:
    """Examples of a data set that could not be read, which trainings do without.

    Args:
      limit: how many there may be.
    """

    def __init__(self, limit: int = 0):
        self.limit = limit
        self.found: dict[tuple[int, int], object] = {}  # keeps the sources, and their ids, alive

    def note(self, source, index: int, reason: str = "") -> None:
        """Counts an example, with a warning at its first time.

        Raises:
          UserError: if that is one too many.
        """
        if (id(source), index) in self.found:
            return
        self.found[id(source), index] = source
        if not reason:
            try:
                example(source, index)
            except Unreadable as error:
                reason = str(error)
        text = f"example {index} of the data set cannot be read ({reason})"
        if len(self.found) > self.limit:
            raise UserError(
                f"{text}, and config.max_damaged={self.limit} allows"
                f" {self.limit or 'none'}: mend or remove it, or allow more"
            )
        warnings.warn(f"{text}: {len(self.found)} of at most {self.limit} left out", stacklevel=2)
