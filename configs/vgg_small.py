"""PKKD with VGG-small on CIFAR-10, or CIFAR-100 with `:data=cifar100`, the recipe of the paper.

    python -m pkkd_jax.main --config=configs/vgg_small.py --config.data.data_dir=DIR
    python -m pkkd_jax.main --config=configs/vgg_small.py:data=cifar100

400 epochs of SGD: for a GPU or TPU; not timed here. The paper reports 95.03% on CIFAR-10 and 76.94%
on CIFAR-100 for the student.
"""

from pkkd_jax import config as config_lib


def get_config(arg=None):
    config = config_lib.base()
    config.student = dict(name="vgg_small", conv="adder", dropout=0.0)
    config.teacher = dict(name="vgg_small", conv="conv", dropout=0.0)
    return config_lib.with_argument(config, arg)
