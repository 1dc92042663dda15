"""PKKD with ResNet-20 on CIFAR-10 (`:data=cifar100` for CIFAR-100), the recipe of the paper.

    python -m pkkd_jax.main --config=configs/resnet20.py --config.data.data_dir=DIR

400 epochs of SGD. The paper reports 92.96% on CIFAR-10 and 69.93% on CIFAR-100 for the student.

Ten epochs, `--config.epochs=10 --config.batch_size=128`, give 80.8% (one run), in under four
minutes an epoch on two cores with AVX-512. On so short a schedule a teacher trained before is
better, and the kernel is not needed: 81.9% (one run), by the two commands in README, which has
one of three epochs, too. Alone (`:distill=none`), six epochs are best with the largest of six
values of `config.optim.adder_eta` that were tried, 0.05 to 1.6.

Thirty epochs give 85.0% (two runs), no more than the adder network alone (85.1%), and less than
`:distill=kd` (86.0%, one run).
"""

from pkkd_jax import config as config_lib


def get_config(arg=None):
    config = config_lib.base()
    config.student.depth = 20
    config.teacher.depth = 20
    return config_lib.with_argument(config, arg)
