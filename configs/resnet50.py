"""PKKD with ResNet-50 on ImageNet, the recipe of the paper.

    python -m pkkd_jax.main --config=configs/resnet50.py --config.data.data_dir=DIR

150 epochs of SGD with weight decay 1e-4, batch 256: for several GPUs or a TPU slice, not timed
here. The paper reports 76.8% for the student. Smaller images by `--config.data.image_size=64`,
decoding in processes by `--config.workers=8`.
"""

from pkkd_jax import config as config_lib


def get_config(arg=None):
    config = config_lib.base()
    config.data = dict(name="imagenet2012", image_size=224)
    for network in (config.student, config.teacher):
        network.name = "resnet_imagenet"
        network.depth = 50
    config.epochs = 150
    config.optim.weight_decay = 1e-4
    return config_lib.with_argument(config, arg)
