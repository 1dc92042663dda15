"""Image files in folders, one sub-folder a class."""

from pathlib import Path

from PIL import Image

from pkkd_jax.names import UserError

__all__ = ["folder"]

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


class folder:
    """`DIR/train/CLASS/*` and `DIR/test/CLASS/*` (or `DIR/val`): JPEG, PNG, BMP or WebP.

    Classes are the sub-folders of `train` in alphabetical order.

    Args:
      split: "train" or "test".
      data_dir: DIR.
      image_size: height and width that the network sees.
      augmentation: "resized_crop" for images of any size; "crop_flip" or "none" for images that
        all have `image_size`.
    Raises:
      UserError: if there are no such folders or images.
    """

    mean = (123.675, 116.28, 103.53)
    std = (58.395, 57.12, 57.375)

    def __init__(
        self,
        split: str = "train",
        data_dir: str = "",
        image_size: int = 224,
        augmentation: str = "resized_crop",
    ):
        root = Path(data_dir).expanduser()
        if not data_dir or not (root / "train").is_dir():
            raise UserError(
                f"data set 'folder' found no {str(root / 'train')!r}: set data_dir to"
                " a directory with train/CLASS/*.jpg and test/CLASS/*.jpg"
            )
        place = root / split
        if split == "test" and not place.is_dir():
            place = root / "val"
        if not place.is_dir():
            raise UserError(f"data set 'folder' found neither {str(root / 'test')!r} nor 'val'")
        classes = sorted(p.name for p in (root / "train").iterdir() if p.is_dir())
        unknown = sorted({p.name for p in place.iterdir() if p.is_dir()} - set(classes))
        if unknown:
            raise UserError(f"class {unknown[0]!r} of {str(place)!r} is not in 'train': {classes}")
        self._files = [
            (path, label)
            for label, name in enumerate(classes)
            for path in sorted((place / name).glob("*"))
            if path.suffix.lower() in SUFFIXES
        ]
        if not self._files:
            raise UserError(
                f"no images under {str(place)!r}: expected {', '.join(sorted(SUFFIXES))}"
            )
        self.num_classes = len(classes)
        self.image_shape = (image_size, image_size, 3)
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict:
        path, label = self._files[index]
        image = Image.open(path).convert("RGB")
        if self.augmentation != "resized_crop" and image.size != self.image_shape[1::-1]:
            raise UserError(
                f"image {str(path)!r} is {image.size[0]}x{image.size[1]}, not"
                f" {self.image_shape[1]}x{self.image_shape[0]}: augmentation"
                f" {self.augmentation!r} wants one size, 'resized_crop' takes any"
            )
        return {"image": image, "label": label}
