"""Sources made of arrays, and of parts of other sources."""

import dataclasses

import numpy as np

ATTRIBUTES = ("num_classes", "image_shape", "mean", "std", "augmentation")  # of a `data.Source`


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
    """uint8 images `[n, height, width, channels]` and int32 labels `[n]` as a `data.Source`.

    At the indices in `unreadable`, other examples stand in.
    """

    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: str = "none"
    unreadable: tuple[int, ...] = ()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(height, width, channels)`."""
        return tuple(self.images.shape[1:])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index], "label": int(self.labels[index])}

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Everything at once."""
        return self.images, self.labels


class Part:
    """The examples of `source` at `indices`, as a `data.Source`."""

    def __init__(self, source, indices: np.ndarray):
        self._source, self._indices = source, indices
        for name in ATTRIBUTES:
            setattr(self, name, getattr(source, name))

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict:
        return self._source[int(self._indices[index])]
