"""PKKD with ResNet-32 on CIFAR-10 (`:data=cifar100` for CIFAR-100), the recipe of the paper.

    python -m pkkd_jax.main --config=configs/resnet32.py --config.data.data_dir=DIR

400 epochs of SGD. The paper reports 93.62% on CIFAR-10 and 72.41% on CIFAR-100 for the student.
Trained here as a teacher only.
"""

from pkkd_jax import config as config_lib


def get_config(arg=None):
    config = config_lib.base()
    config.student.depth = 32
    config.teacher.depth = 32
    return config_lib.with_argument(config, arg)
