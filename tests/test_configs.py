"""Every configuration builds and its update has consistent shapes; nothing is computed."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from pkkd_jax import config as config_lib
from pkkd_jax import data, devices, experiment, update
from pkkd_jax.data.arrays import ArraySource
from pkkd_jax.recipe import hyperparameters, init_state

CONFIGS = Path(__file__).parent.parent / "configs"
SOURCES = {"digits": (8, 1, 10), "cifar10": (32, 3, 10), "cifar100": (32, 3, 100),
           "imagenet2012": (224, 3, 1000)}  # fmt: skip
CASES = [(path.stem, None) for path in sorted(CONFIGS.glob("*.py"))] + [
    ("vgg_small", "data=cifar100"),
    ("resnet20", "distill=kd"),
    ("resnet20", "distill=none"),
    ("resnet20", "optim=adamw"),
    ("resnet20", "student=vgg_small,teacher=vgg_small,distill=kd"),
    ("resnet18", "data=cifar10,student=resnet_cifar,teacher=resnet_cifar"),
]


def load(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_config_builds_and_its_update_keeps_shapes(name, argument, monkeypatch):
    def build_source(split, damage, *, name, **arguments):
        del split, damage, arguments
        size, channels, classes = SOURCES[name]
        images = np.zeros((300, size, size, channels), np.uint8)
        mean = (0.0,) * channels
        return ArraySource(images, np.zeros(300, np.int32), classes, mean, (1.0,) * channels)

    monkeypatch.setattr(data, "build_source", build_source)
    config = load(name).get_config(argument)
    assert config.is_locked
    built = experiment.build(config)
    images = np.zeros((8, *built.splits.train.image_shape), np.uint8)
    state = jax.eval_shape(lambda: init_state(built.recipe, images))
    shape = (4, 1, 2)
    batch = {
        "image": jax.ShapeDtypeStruct((*shape, *images.shape[1:]), np.uint8),
        "label": jax.ShapeDtypeStruct(shape, np.int32),
    }
    mapped = jax.vmap(
        update.joint_update(built.recipe),
        axis_name=devices.AXIS,
        in_axes=(None, 0, None),
        out_axes=None,
    )
    after, metrics = jax.eval_shape(mapped, state, batch, hyperparameters(built.recipe))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(
        lambda a: (a.shape, a.dtype), state
    )
    assert metrics["student/loss"].shape == ()


def test_an_optimiser_is_swapped_with_its_keywords_and_keeps_the_schedule():
    config = load("resnet18").get_config("optim=adamw")
    kept = dict(name="adamw", schedule_name="cosine", weight_decay=1e-4, adder_eta=0.2)
    assert kept.items() <= config.optim.to_dict().items()
    assert config.optim.b1 == 0.9
    assert "momentum" not in config.optim


def test_a_part_that_is_written_anew_gets_the_leaves_that_it_always_has():
    config = config_lib.base()
    config.optim = dict(name="adamw", learning_rate=1e-3)
    config.teacher = dict(name="vgg_small", conv="conv")
    config = config_lib.with_argument(config, None)
    assert (config.optim.learning_rate, config.optim.cycles) == (1e-3, 1)
    assert (config.teacher.mode, config.teacher.which) == ("progressive", "teacher")


def test_naming_what_is_there_already_changes_nothing():
    argument = "data=cifar10,student=resnet_cifar,teacher=resnet_cifar,optim=sgd"
    assert load("resnet32").get_config(argument) == load("resnet32").get_config()


@pytest.mark.parametrize("name", [path.stem for path in sorted(CONFIGS.glob("*.py"))])
def test_the_card_of_a_config_shows_its_command(name):
    assert f"python -m pkkd_jax.main --config=configs/{name}.py" in load(name).__doc__
