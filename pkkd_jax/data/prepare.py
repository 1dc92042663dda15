"""Prepares a data set with TensorFlow Datasets, once; training then reads it without TensorFlow.

python -m pkkd_jax.data.prepare cifar10 [--data_dir DIR]
"""

import argparse
import importlib.util
import sys

from pkkd_jax import names
from pkkd_jax.data.sources import tfds as sources


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser("python -m pkkd_jax.data.prepare", description=__doc__)
    parser.add_argument("name", help=", ".join(sources.__all__))
    parser.add_argument("--data_dir", help="default: ~/tensorflow_datasets")
    arguments = parser.parse_args(argv)
    try:
        if arguments.name not in sources.__all__:
            raise names.unknown("data set", arguments.name, sources.__all__)
        if importlib.util.find_spec("tensorflow") is None:
            raise names.UserError(
                "preparing a data set needs TensorFlow: run `pip install -e '.[prepare]'`"
            )
    except names.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.name == "imagenet2012":
        print(
            "imagenet2012 cannot be downloaded without an account: put ILSVRC2012_img_train.tar and"
            " ILSVRC2012_img_val.tar into downloads/manual/ of the data directory first."
        )
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(
            arguments.name, data_dir=arguments.data_dir, file_format="array_record"
        )
        builder.download_and_prepare()
        records = sources.Records(arguments.name, "train", str(builder.data_dir_root))
        records[len(records) - 1]
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        print(
            f"error: {arguments.name} was not prepared ({type(error).__name__}: {text}); if its"
            " directory holds it damaged or in another file format, delete it or name another by"
            " --data_dir",
            file=sys.stderr,
        )
        return 2
    print(f"prepared {arguments.name} in {builder.data_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
