"""Every model: its taps, its parameters, its size against published figures, its errors."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from flax.traverse_util import flatten_dict

from pkkd_jax.models import build
from pkkd_jax.names import UserError, public_names
from pkkd_jax.nn import AdderConv

KEY = jax.random.key(0)
CIFAR, IMAGENET, DIGITS = (2, 32, 32, 3), (2, 224, 224, 3), (2, 28, 28, 1)
MODELS = [
    ("resnet_cifar", 20, CIFAR),
    ("resnet_imagenet", 18, IMAGENET),
    ("resnet_imagenet", 50, IMAGENET),
    ("vgg_small", None, CIFAR),
    ("lenet5", None, DIGITS),
]
every_model = pytest.mark.parametrize(("name", "depth", "shape"), MODELS)
either_convolution = pytest.mark.parametrize("conv", ["conv", "adder"])


def make(name, depth=None, **fields):
    return build(name, **{"num_classes": 10, **fields}, **({"depth": depth} if depth else {}))


@functools.cache
def trace(name, depth, shape, conv, train=True):
    """Shapes of `(outputs, variables)`, nothing computed."""
    model = make(name, depth, conv=conv)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda x: model.init_with_output(KEY, x, train=train), images)


def kernels(name, depth, shape, conv):
    """Maps every convolution's tap, and "classifier", to (name, shape) of its parameter."""
    params = flatten_dict(trace(name, depth, shape, conv)[1]["params"])
    return {
        ".".join(path[:-1]).replace("_block", ".block"): (path[-1], leaf.shape)
        for path, leaf in params.items()
        if path[-1] in ("kernel", "filters")
    }


def responses(name, depth, shape, conv):
    """The taps that convolutions make, and the classifier's input."""
    features = trace(name, depth, shape, conv)[0].features
    return {tap: leaf for tap, leaf in features.items() if not tap.endswith(".out")}


def terms(name, depth, conv="adder", shape=(1, 224, 224, 3), num_classes=1000):
    """Multiply-accumulates of an image in filters and in kernels: places times parameters."""
    counts = {"filters": 0, "kernel": 0}
    features = trace(name, depth, shape, conv)[0].features
    for tap, (parameter, size) in kernels(name, depth, shape, conv).items():
        places = 1 if tap == "classifier" else math.prod(features[tap].shape[1:3])
        if tap == "classifier":
            size = (size[0], num_classes)
        counts[parameter] += places * math.prod(size)
    return counts["filters"], counts["kernel"]


def test_there_are_four_families():
    families = {"resnet_cifar", "resnet_imagenet", "vgg_small", "lenet5"}
    assert set(public_names("pkkd_jax.models")) == families


@pytest.mark.parametrize(("depth", "adder"), [(20, 40.37), (32, 68.68)])
def test_cifar_resnets_have_the_published_number_of_terms(depth, adder):
    found = terms("resnet_cifar", depth, shape=(1, 32, 32, 3), num_classes=10)
    np.testing.assert_allclose(np.array(found) / 1e6, (adder, 0.44), atol=0.005)


@pytest.mark.parametrize(("depth", "adder", "rest"), [(18, 1.696, 0.119), (50, 3.969, 0.120)])
def test_imagenet_resnets_have_the_published_number_of_terms(depth, adder, rest):
    found = terms("resnet_imagenet", depth)
    np.testing.assert_allclose(np.array(found) / 1e9, (adder, rest), atol=0.0005)


@pytest.mark.parametrize(
    ("depth", "published"),
    [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160), (152, 60_192_808)],
)
def test_imagenet_resnets_have_torchvisions_parameters_and_a_last_batch_norm(depth, published):
    model = make("resnet_imagenet", depth, num_classes=1000)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(lambda x: model.init(KEY, x, train=False), images)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == published + 2 * 1000


@every_model
def test_swapping_the_convolution_changes_the_name_of_its_parameter_only(name, depth, shape):
    outputs, variables = trace(name, depth, shape, "conv")
    swapped, adder = trace(name, depth, shape, "adder")
    renamed = {
        tuple("kernel" if key == "filters" else key for key in path): leaf
        for path, leaf in flatten_dict(adder).items()
    }
    assert (swapped, renamed) == (outputs, flatten_dict(variables))


@every_model
def test_only_stem_and_classifier_keep_an_ordinary_kernel(name, depth, shape):
    found = kernels(name, depth, shape, "adder")
    ordinary = {tap for tap, (parameter, _) in found.items() if parameter == "kernel"}
    assert ordinary == {"stem", "classifier"}


@every_model
@either_convolution
def test_every_convolution_is_a_tap_and_so_is_the_classifiers_input(name, depth, shape, conv):
    taps = {*kernels(name, depth, shape, conv), "penultimate"} - {"classifier"}
    assert set(responses(name, depth, shape, conv)) == taps


@every_model
@either_convolution
def test_what_layers_and_blocks_hand_on_are_taps(name, depth, shape, conv):
    features = trace(name, depth, shape, conv)[0].features
    layers = {tap.rpartition(".")[0] for tap in features if ".block" in tap} or {
        tap for tap in features if tap.startswith("conv") and "." not in tap
    }
    wanted = {f"{layer}.out" for layer in {"stem", *layers}}
    assert {tap for tap in features if tap.endswith(".out")} == wanted


@every_model
def test_taps_are_raw_outputs_in_forward_order(name, depth, shape):
    model = make(name, depth)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = trace(name, depth, shape, "conv")[1]
    jaxpr = jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(variables, images).jaxpr
    produced = [e.outvars[0] for e in jaxpr.eqns if e.primitive.name == "conv_forward"]
    # Outputs are flattened as (logits, *features).
    taps = list(trace(name, depth, shape, "conv")[0].features)
    found = dict(zip(taps, jaxpr.outvars[1:], strict=True))
    assert produced == [found[tap] for tap in responses(name, depth, shape, "conv")][:-1]


@every_model
@either_convolution
@pytest.mark.parametrize("train", [True, False])
def test_logits_are_one_number_a_class(name, depth, shape, conv, train):
    logits = trace(name, depth, shape, conv, train)[0].logits
    assert (logits.shape, logits.dtype) == ((2, 10), jnp.float32)


def test_cifar_taps_have_the_shapes_of_the_stages():
    features = responses("resnet_cifar", 8, CIFAR, "adder")
    assert {tap: leaf.shape[1:] for tap, leaf in features.items()} == {
        "stem": (32, 32, 16),
        "stage1.block1.conv1": (32, 32, 16),
        "stage1.block1.conv2": (32, 32, 16),
        "stage2.block1.conv1": (16, 16, 32),
        "stage2.block1.conv2": (16, 16, 32),
        "stage2.block1.shortcut": (16, 16, 32),
        "stage3.block1.conv1": (8, 8, 64),
        "stage3.block1.conv2": (8, 8, 64),
        "stage3.block1.shortcut": (8, 8, 64),
        "penultimate": (64,),
    }


def test_a_bottleneck_strides_in_its_3x3():
    features = trace("resnet_imagenet", 50, IMAGENET, "adder")[0].features
    block = {tap: features[f"stage2.block1.{tap}"].shape[1:] for tap in ("conv1", "conv2", "conv3")}
    assert block == {"conv1": (56, 56, 128), "conv2": (28, 28, 128), "conv3": (28, 28, 512)}


def test_vgg_taps_have_the_published_widths():
    features = responses("vgg_small", None, CIFAR, "adder")
    assert {tap: leaf.shape[1:] for tap, leaf in features.items()} == {
        "stem": (32, 32, 128),
        "conv1": (32, 32, 128),
        "conv2": (16, 16, 256),
        "conv3": (16, 16, 256),
        "conv4": (8, 8, 512),
        "conv5": (8, 8, 512),
        "penultimate": (8192,),
    }


@pytest.mark.parametrize("side", [28, 32])
def test_lenet_takes_digits_of_both_sizes(side):
    features = responses("lenet5", None, (1, side, side, 1), "adder")
    assert {tap: leaf.shape[1:] for tap, leaf in features.items()} == {
        "stem": (28, 28, 6),
        "conv1": (10, 10, 16),
        "conv2": (1, 1, 120),
        "conv3": (1, 1, 84),
        "penultimate": (84,),
    }


def test_strided_convolutions_pad_both_sides_as_torch_does():
    model = make("resnet_imagenet", 18)
    variables = trace("resnet_imagenet", 18, IMAGENET, "conv")[1]
    images = jax.ShapeDtypeStruct(IMAGENET, jnp.float32)
    jaxpr = jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(variables, images).jaxpr
    strided = [
        (eqn.invars[1].aval.shape[0], *eqn.params["geometry"].padding)
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "conv_forward" and eqn.params["geometry"].strides == (2, 2)
    ]
    stage = [(3, (1, 1), (1, 1)), (1, (0, 0), (0, 0))]
    assert strided == [(7, (3, 3), (3, 3)), *stage * 3]


@pytest.mark.parametrize(("name", "shape"), [("resnet_cifar", CIFAR), ("lenet5", DIGITS)])
def test_dtype_is_that_of_the_features_but_not_of_the_logits(name, shape):
    model = make(name, conv="adder", dtype="bfloat16")
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    outputs, _ = jax.eval_shape(lambda x: model.init_with_output(KEY, x, train=True), images)
    found = {leaf.dtype.name for leaf in outputs.features.values()}, outputs.logits.dtype.name
    assert found == ({"bfloat16"}, "float32")


@pytest.fixture(scope="module")
def lenet():
    """A small model with dropout, its variables and images."""
    model = make("lenet5", conv="adder", dropout=0.5)
    images = jax.random.normal(KEY, (4, 28, 28, 1))
    return model, model.init(KEY, images, train=False), images


def test_dropout_needs_a_key_in_training(lenet):
    model, variables, images = lenet
    with pytest.raises(Exception, match="dropout"):
        jax.eval_shape(lambda: model.apply(variables, images, train=True, mutable="batch_stats"))


def test_dropout_drops_in_training(lenet):
    model, variables, images = lenet
    logits = [
        model.apply(
            variables,
            images,
            train=True,
            mutable="batch_stats",
            rngs={"dropout": jax.random.key(i)},
        )[0].logits
        for i in range(2)
    ]
    assert not np.allclose(*logits)


def test_dropout_is_absent_outside_training(lenet):
    model, variables, images = lenet
    dropped = model.apply(variables, images, train=False).logits
    kept = model.clone(dropout=0.0).apply(variables, images, train=False).logits
    np.testing.assert_array_equal(dropped, kept)


def test_training_centres_every_logit(lenet):
    model, variables, images = lenet
    outputs, _ = model.clone(dropout=0.0).apply(
        variables, images, train=True, mutable="batch_stats"
    )
    np.testing.assert_allclose(outputs.logits.mean(0), 0, atol=1e-5)


def test_batch_norm_is_synchronised_over_the_axis(lenet):
    model, variables, images = lenet
    model = model.clone(dropout=0.0)

    def logits(model, images):
        return model.apply(variables, images, train=True, mutable="batch_stats")[0].logits

    synchronised = model.clone(bn_axis_name="batch")
    apart = jax.vmap(lambda x: logits(synchronised, x), axis_name="batch")(
        images.reshape(2, 2, 28, 28, 1)
    )
    np.testing.assert_allclose(apart.reshape(4, 10), logits(model, images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("conv", "parameter", "deviation"),
    [("conv", "kernel", math.sqrt(2 / (9 * 64))), ("adder", "filters", 1.0)],
)
def test_kernels_start_as_he_proposes_and_filters_from_a_standard_normal(
    conv, parameter, deviation
):
    images = jnp.zeros((1, 4, 4, 3))
    params = make("resnet_cifar", 8, conv=conv).init(KEY, images, train=False)["params"]
    start = np.asarray(params["stage3_block1"]["conv2"][parameter])
    np.testing.assert_allclose(start.std(), deviation, rtol=0.02)


@pytest.mark.parametrize(
    ("depth", "near"), [(21, "20 or 26"), (19, "14 or 20"), (9, "8 or 14"), (2, "8"), (-4, "8")]
)
def test_a_cifar_depth_that_is_not_6n_plus_2_gets_its_neighbours(depth, near):
    with pytest.raises(UserError, match=f"depth {depth} .* the nearest: {near}$"):
        make("resnet_cifar", depth)


@pytest.mark.parametrize(("name", "depth", "shape"), MODELS[:3])
@pytest.mark.parametrize("multiplier", [0.5, 2.0])
def test_a_width_multiplier_is_that_of_all_channels(name, depth, shape, multiplier):
    def channels(**fields):
        images = jax.ShapeDtypeStruct(shape, jnp.float32)
        model = make(name, depth, **fields)
        found = jax.eval_shape(lambda x: model.init_with_output(KEY, x, train=False)[0], images)
        return {tap: x.shape[-1] for tap, x in found.features.items()}

    plain = channels()
    wanted = {tap: multiplier * count for tap, count in plain.items()}
    assert channels(width_multiplier=multiplier) == wanted
    with pytest.raises(UserError, match=r"width_multiplier=0.001 .* must become 1 to"):
        channels(width_multiplier=0.001)
    with pytest.raises(UserError, match="width_multiplier=nan"):
        channels(width_multiplier=float("nan"))


def test_an_unknown_imagenet_depth_gets_the_known_ones():
    with pytest.raises(UserError, match=r"depth 20 .* 18, 34, 50, 101, 152"):
        make("resnet_imagenet", 20)


@pytest.mark.parametrize(
    ("name", "shape", "takes"),
    [
        ("resnet_cifar", (1, 3, 32, 3), "at least 4"),
        ("resnet_cifar", (1, 32, 32), "batch, height, width, channels"),
        ("resnet_imagenet", (1, 224, 31, 3), "at least 32"),
        ("vgg_small", (1, 7, 7, 3), "at least 8"),
        ("lenet5", (1, 8, 8, 1), "28x28 or 32x32"),
        ("lenet5", (1, 28, 32, 1), "28x28 or 32x32"),
        ("lenet5", (28, 28, 1), "28x28 or 32x32"),
    ],
)
def test_images_that_do_not_fit_are_refused_with_their_shape(name, shape, takes):
    with pytest.raises(UserError, match=takes) as error:
        trace(name, None, shape, "conv")
    assert str(shape) in str(error.value)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("resnet_cifar", (1, 4, 5, 3)),
        ("resnet_imagenet", (1, 32, 33, 3)),
        ("vgg_small", (1, 8, 9, 1)),
    ],
)
def test_the_smallest_images_leave_a_pixel(name, shape):
    *_, last, _ = trace(name, None, shape, "adder")[0].features.values()
    assert min(last.shape) >= 1


def test_a_wrong_model_gets_the_nearest_name():
    with pytest.raises(UserError, match="did you mean 'resnet_cifar'"):
        make("resnet_cfar")


def test_a_wrong_convolution_is_refused_when_the_model_is_made():
    with pytest.raises(UserError, match="did you mean 'adder'"):
        make("vgg_small", conv="adders")


@pytest.mark.parametrize("name", ["resnet_cifar", "vgg_small"])
def test_a_wrong_keyword_gets_the_nearest_one(name):
    with pytest.raises(
        UserError, match=f"'{name}', 'dropuot': did you mean 'dropout'.*num_classes"
    ):
        make(name, dropuot=0.1)


@pytest.mark.parametrize("name", ["resnet_cifar", "vgg_small"])
def test_a_missing_keyword_is_named(name):
    with pytest.raises(UserError, match=f"'{name}' needs num_classes"):
        build(name)


class OwnConv(AdderConv):
    """A user's own convolution, named by its dotted path."""

    input_gradient: str = "sign"


class OwnModel(linen.Module):
    """A user's own model, named by its dotted path."""

    num_classes: int


def test_a_users_own_convolution_stands_in_every_swapped_place():
    model = make("vgg_small", conv=f"{__name__}.OwnConv")
    images = jax.ShapeDtypeStruct(CIFAR, jnp.float32)
    jaxpr = str(jax.make_jaxpr(lambda x: model.init_with_output(KEY, x, train=False))(images))
    assert jaxpr.count("input_gradient='sign'") >= 5


def test_a_users_own_model_is_made_from_its_dotted_path():
    assert build(f"{__name__}.OwnModel", num_classes=3) == OwnModel(num_classes=3)
