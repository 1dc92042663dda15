"""PKKD on the digits that scikit-learn brings along: a quarter of a minute on two cores.

    python -m pkkd_jax.main --config=configs/quickstart.py

An adder ResNet-8 and its CNN teacher on 1,437 images of 8x8; the student reaches 97.5% or more of
the 360 test images.
"""

from pkkd_jax import config as config_lib


def get_config(arg=None):
    config = config_lib.base()
    config.data = dict(name="digits", augmentation="none")
    config.student.depth = 8
    config.teacher.depth = 8
    config.batch_size = 64
    config.epochs = 30
    config.eval.every_epochs = 5.0
    config.log_every_steps = 20
    return config_lib.with_argument(config, arg)
