"""PKKD with ResNet-20 on CIFAR-10 (`:data=cifar100` for CIFAR-100), the recipe of the paper.

    python -m pkkd_jax.main --config=configs/resnet20.py --config.data.data_dir=DIR

400 epochs of SGD. The paper reports 92.96% on CIFAR-10 and 69.93% on CIFAR-100 for the student.

With `--config.batch_size=128`, a short schedule and a teacher trained as long before (one run each,
the teacher's own accuracy in brackets; README has the commands of six epochs, and all are rows of
`python -m experiments.table response1`, response5 and short):

    epochs   distil by                                  student (teacher)
    3        pkkd, its weight 100 to 1 by a cosine      78.8% (82.5% after ten)
    6        pkkd, its weight 100 to 0.1 exponentially  79.0% (78.5%)
    10       pkkd, config.distill.pkkd.kernel=False     81.9% (82.5%)
    30       attention_transfer+kd                      86.6% (87.0%)

PKKD with a teacher that learns beside has 76.6, 80.5 and 85.1% after 6, 10 and 30 epochs (one, two
and three runs), the adder network alone 74.4, 79.5 and 85.1%. On one core of an EPYC with AVX-512
an epoch takes the network alone 99 s, PKKD 208 s and a student beside a fixed teacher 126 to 159 s;
on an H200 the bare step of PKKD at batch 256 makes 25,700 images a second.
"""

from pkkd_jax import config as config_lib


def get_config(arg=None):
    config = config_lib.base()
    config.student.depth = 20
    config.teacher.depth = 20
    return config_lib.with_argument(config, arg)
