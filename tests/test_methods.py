"""Distillation methods against float64 formulations, and properties that a misreading breaks."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pkkd_jax import config, distill, models
from pkkd_jax.distill.attention import attention_transfer
from pkkd_jax.distill.correlation import correlation_congruence
from pkkd_jax.distill.fitnets import fitnets
from pkkd_jax.distill.fsp import fsp
from pkkd_jax.distill.kd import kd
from pkkd_jax.distill.pkkd import pkkd
from pkkd_jax.distill.pkt import pkt
from pkkd_jax.distill.relational import relational
from pkkd_jax.distill.similarity import similarity_preserving
from pkkd_jax.distill.taps import pair_taps
from pkkd_jax.names import UserError
from pkkd_jax.nn import Outputs

SHAPES = {
    "stage1.block1.conv2": (8, 5, 3, 6),
    "stage1.block1.out": (8, 5, 3, 6),
    "stage1.block2.conv2": (8, 5, 3, 6),
    "stage1.block2.out": (8, 5, 3, 6),
    "stage2.block1.conv2": (8, 3, 2, 7),
    "stage2.block1.out": (8, 3, 2, 7),
    "stage2.block2.conv2": (8, 3, 2, 7),
    "stage2.block2.out": (8, 3, 2, 7),
    "penultimate": (8, 7),
}
WIDER = {tap: (*shape[:-1], shape[-1] + 4) for tap, shape in SHAPES.items()}
STAGES = ("stage1.block2.out", "stage2.block2.out")
METHODS = {
    "kd": kd,
    "pkkd": pkkd,
    "fitnets": fitnets,
    "attention_transfer": attention_transfer,
    "similarity_preserving": similarity_preserving,
    "fsp": fsp,
    "relational": relational,
    "pkt": pkt,
    "correlation_congruence": correlation_congruence,
}


def outputs(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    features = {tap: jnp.float32(rng.normal(size=shape)) for tap, shape in shapes.items()}
    return Outputs(jnp.float32(rng.normal(size=(8, 10))), features)


def value(distiller, student, teacher):
    params = distiller.init(jax.random.key(0), student, teacher)
    return distiller.apply(params, student, teacher, None)[0]


def double(outputs, tap):
    return np.asarray(outputs.features[tap], np.float64)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def float64_fitnets(student, teacher):
    params = fitnets().init(jax.random.key(0), student, teacher)
    losses = []
    for tap in STAGES:
        kernel, bias = (np.asarray(params[tap][key], np.float64) for key in ("kernel", "bias"))
        x, wanted = double(student, tap), double(teacher, tap)
        losses.append(((np.einsum("nhwi,io->nhwo", x, kernel) + bias - wanted) ** 2).mean())
    return np.mean(losses)


def float64_attention(student, teacher):
    total = 0.0
    for tap in STAGES:
        for a, b in zip(double(student, tap), double(teacher, tap), strict=True):
            maps = [unit((side**2).sum(-1).ravel()) for side in (a, b)]
            total += ((maps[0] - maps[1]) ** 2).sum() / 8 / 2
    return total


def float64_similarity(student, teacher):
    total = 0.0
    for tap in STAGES:
        s, t = (double(o, tap).reshape(8, -1) for o in (student, teacher))
        total += ((unit(t @ t.T) - unit(s @ s.T)) ** 2).sum() / 64
    return total


def float64_fsp(student, teacher):
    losses = []
    for stage in (1, 2):
        first, last = f"stage{stage}.block1.out", f"stage{stage}.block2.out"
        for n in range(8):
            flows = []
            for o in (teacher, student):
                a, b = double(o, first)[n], double(o, last)[n]
                h, w, _ = a.shape
                flows.append(
                    sum(np.outer(a[i, j], b[i, j]) for i in range(h) for j in range(w)) / h / w
                )
            losses.append(((flows[0] - flows[1]) ** 2).sum())
    return np.mean(losses)


def huber(x):
    return 0.5 * x**2 if abs(x) <= 1 else abs(x) - 0.5


def float64_relational(student, teacher):
    s, t = (double(o, "penultimate") for o in (student, teacher))
    n = range(8)
    pairs = [(i, j) for i in n for j in n if i != j]
    psi = lambda x, i, j: np.linalg.norm(x[i] - x[j])  # noqa: E731
    mean_s, mean_t = (np.mean([psi(x, i, j) for i, j in pairs]) for x in (s, t))
    distance = np.mean([huber(psi(s, i, j) / mean_s - psi(t, i, j) / mean_t) for i, j in pairs])
    cos = lambda x, i, j, k: unit(x[i] - x[j]) @ unit(x[k] - x[j])  # noqa: E731
    triples = [(i, j, k) for i in n for j in n for k in n if len({i, j, k}) == 3]
    angle = np.mean([huber(cos(s, *each) - cos(t, *each)) for each in triples])
    return 25 * distance + 50 * angle


def float64_pkt(student, teacher):
    def likelihoods(x, j):
        kernel = {i: (unit(x[i]) @ unit(x[j]) + 1) / 2 for i in range(8) if i != j}
        return {i: k / sum(kernel.values()) for i, k in kernel.items()}

    total = 0.0
    for j in range(8):
        p = likelihoods(double(teacher, "penultimate"), j)
        q = likelihoods(double(student, "penultimate"), j)
        total += sum(p[i] * math.log(p[i] / q[i]) for i in p) / 8
    return total


def float64_correlation(student, teacher):
    def matrix(x):
        c = unit(x) @ unit(x).T
        return math.exp(-0.8) * (1 + 0.8 * c + 0.32 * c**2)

    s, t = (matrix(double(o, "penultimate")) for o in (student, teacher))
    return ((s - t) ** 2).sum() / 64


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        (fitnets, float64_fitnets),
        (attention_transfer, float64_attention),
        (similarity_preserving, float64_similarity),
        (fsp, float64_fsp),
        (relational, float64_relational),
        (pkt, float64_pkt),
        (correlation_congruence, float64_correlation),
    ],
)
def test_it_equals_the_float64_formulation(method, wanted):
    student, teacher = outputs(0), outputs(1)
    np.testing.assert_allclose(
        value(method(), student, teacher), wanted(student, teacher), rtol=2e-5
    )
    if method is not fsp:  # which compares channel by channel
        wider = outputs(1, WIDER)
        np.testing.assert_allclose(
            value(method(), student, wider), wanted(student, wider), rtol=2e-5
        )


def test_fsp_refuses_a_wider_teacher():
    with pytest.raises(UserError, match=r"stage1.block1.out.*\[8, 5, 3, 6\].*\[8, 5, 3, 10\]"):
        fsp().apply({}, outputs(0), outputs(1, WIDER), None)


def test_fitnets_is_zero_where_the_regressor_gives_the_teachers_features():
    student, mix = outputs(0), jnp.float32(np.random.default_rng(1).normal(size=(7, 11)))
    stage = {"stage2.block2.out": student.features["stage2.block2.out"] @ mix + 3}
    teacher = Outputs(student.logits, {**outputs(1, WIDER).features, **stage})
    distiller = fitnets("stage2.block2.out")
    params = {"stage2.block2.out": {"kernel": mix, "bias": jnp.full(11, 3.0)}}
    assert distiller.apply(params, student, teacher, None)[0] < 1e-10
    assert value(distiller, student, teacher) > 0.1


@pytest.mark.parametrize("name", [name for name in METHODS if name != "fitnets"])
def test_it_is_zero_when_student_equals_teacher(name):
    same, other = outputs(0), outputs(1)
    scale = float(value(METHODS[name](), same, other))
    assert abs(float(value(METHODS[name](), same, same))) < 1e-4 * scale


def rotated(outputs, seed=7):
    """The same with the features of all examples rotated together."""
    features = {}
    for tap, x in outputs.features.items():
        flat = np.asarray(x).reshape(len(x), -1)
        noise = np.random.default_rng(seed).normal(size=(flat.shape[1],) * 2)
        features[tap] = jnp.float32((flat @ np.linalg.qr(noise)[0]).reshape(x.shape))
    return Outputs(outputs.logits, features)


@pytest.mark.parametrize("method", [similarity_preserving, relational, correlation_congruence, pkt])
def test_what_compares_examples_is_unchanged_by_a_rotation_of_the_features(method):
    student, teacher = outputs(0), outputs(1)
    plain = value(method(), student, teacher)
    np.testing.assert_allclose(value(method(), rotated(student), teacher), plain, rtol=1e-4)


def test_attention_is_unchanged_by_a_permutation_of_the_channels_and_not_of_the_places():
    student, teacher = outputs(0), outputs(1)
    plain = value(attention_transfer(), student, teacher)
    channels = Outputs(student.logits, {k: x[..., ::-1] for k, x in student.features.items()})
    places = Outputs(
        student.logits, {k: x[:, ::-1] if x.ndim == 4 else x for k, x in student.features.items()}
    )
    np.testing.assert_allclose(value(attention_transfer(), channels, teacher), plain, rtol=1e-5)
    assert abs(value(attention_transfer(), places, teacher) - plain) > 1e-3 * plain


@pytest.mark.parametrize("name", METHODS)
def test_four_devices_equal_one(name):
    distiller, student, teacher = METHODS[name](), outputs(0), outputs(1)
    params = distiller.init(jax.random.key(0), student, teacher)

    def gradient(axis_name, student, teacher):
        loss = lambda *args: distiller.apply(*args, teacher, axis_name)[0]  # noqa: E731
        found, (of_params, of_student) = jax.value_and_grad(loss, argnums=(0, 1))(params, student)
        if axis_name is not None:  # as the update does; an example's own share is not averaged
            found, of_params = jax.lax.pmean((found, of_params), axis_name)
            of_student = jax.tree.map(lambda g: g / 4, of_student)
        return found, of_params, of_student

    split = lambda tree: jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), tree)  # noqa: E731
    four = jax.pmap(partial(gradient, "batch"), axis_name="batch")(split(student), split(teacher))
    loss, of_params, of_student = gradient(None, student, teacher)
    np.testing.assert_allclose(four[0], loss, rtol=1e-4)
    for a, b in zip(jax.tree.leaves(four[1]), jax.tree.leaves(of_params), strict=True):
        np.testing.assert_allclose(a[0], b, rtol=1e-3, atol=1e-5)
    for a, b in zip(jax.tree.leaves(four[2]), jax.tree.leaves(of_student), strict=True):
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(a.reshape(b.shape), b, rtol=1e-3, atol=1e-3 * scale + 1e-9)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("fitnets", "pkkd")])
def test_equal_examples_and_silent_features_leave_the_gradient_finite(name, value):
    same = Outputs(jnp.zeros((8, 10)), {k: jnp.full(s, value) for k, s in SHAPES.items()})
    teacher, distiller = outputs(1), METHODS[name]()
    gradient = jax.grad(lambda student: distiller.apply({}, student, teacher, None)[0])(same)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def features(depth, **keywords):
    model = models.build("resnet_cifar", depth=depth, num_classes=10, **keywords)
    images = jnp.zeros((2, 32, 32, 3))
    return jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), images, train=False))[0]


def test_networks_of_different_depth_pair_at_stage_ends_by_default():
    student, teacher = features(8, conv="adder"), features(20)
    found = [pair.name for pair in pair_taps("pkkd", student, teacher, "auto", same="size")]
    assert found == [f"stage{stage}.block1.conv2" for stage in (1, 2, 3)]
    same = [pair.name for pair in pair_taps("pkkd", teacher, teacher, "auto")]
    assert len(same) == 9


def test_pairs_can_be_named_and_must_fit():
    student, teacher = features(8), features(20)
    named = "stage1.block1.conv2:stage1.block3.conv1,penultimate"
    found = pair_taps("pkt", student, teacher, named)
    assert [pair.name for pair in found] == ["stage1.block1.conv2", "penultimate"]
    with pytest.raises(UserError, match=r"stage1.*\[2, 32, 32, 16\].*stage2.*\[2, 16, 16, 32\]"):
        pair_taps("pkkd", student, teacher, "stage1.block1.conv2:stage2.block1.conv2", same="size")
    with pytest.raises(UserError, match=r"3 of the student.*9 of the teacher"):
        pair_taps("pkkd", student, teacher, "block_ends")
    with pytest.raises(UserError, match=r"unknown tap 'stage1.block1.conv9'.*did you mean"):
        pair_taps("pkkd", student, teacher, "stage1.block1.conv9:stage1.block1.conv2")


def test_a_keyword_stands_alone_and_a_tap_once():
    outputs_ = features(20)
    with pytest.raises(UserError, match="'stage_ends' stands alone"):
        pair_taps("pkt", outputs_, outputs_, "stage_ends,penultimate")
    with pytest.raises(UserError, match="stands there twice"):
        pair_taps("pkt", outputs_, outputs_, "penultimate,penultimate")


def test_relations_need_three_examples():
    two = jax.tree.map(lambda x: x[:2], outputs(0))
    with pytest.raises(UserError, match="a batch has 2"):
        relational().apply({}, two, two, None)


def test_fsp_refuses_networks_of_other_stages():
    fewer = {tap: shape for tap, shape in SHAPES.items() if not tap.startswith("stage2")}
    with pytest.raises(UserError, match="1 stages of the student and 2 of the teacher"):
        fsp().apply({}, outputs(0, fewer), outputs(1), None)


def test_fsp_refuses_a_stage_of_one_block():
    with pytest.raises(UserError, match="two blocks or more"):
        fsp().apply({}, features(8), features(8), None)


def test_a_weight_follows_its_schedule():
    losses = {
        "kd": {"weight": 2.0},
        "pkt": {"weight": 0.0, "weight_schedule": "linear", "final_weight": 4.0},
        "fsp": {"weight": 3.0, "weight_schedule": "cosine", "final_weight": 1.0},
        "fitnets": {"weight": 10.0, "weight_schedule": "exponential", "final_weight": 0.1},
    }
    found = {name: weight for name, (weight, _) in distill.build(losses, 100).items()}
    steps = (0, 50, 100)
    assert found["kd"] == 2.0
    np.testing.assert_allclose([found["pkt"](step) for step in steps], [0, 2, 4])
    np.testing.assert_allclose([found["fsp"](step) for step in steps], [3, 2, 1], rtol=1e-6)
    np.testing.assert_allclose([found["fitnets"](step) for step in steps], [10, 1, 0.1], rtol=1e-6)
    with pytest.raises(UserError, match=r"final_weight=0.0 with .*'exponential'.* above 0"):
        distill.build({"kd": {"weight": 1.0, "weight_schedule": "exponential"}}, 100)
    with pytest.raises(UserError, match=r"final_weight=2.0 with weight_schedule='constant'"):
        distill.build({"kd": {"weight": 1.0, "final_weight": 2.0}}, 100)
    with pytest.raises(UserError, match="'cosin': did you mean 'cosine'"):
        distill.build({"kd": {"weight": 1.0, "weight_schedule": "cosin"}}, 100)


def test_methods_combine_by_plus():
    assert list(config.losses("fitnets+kd")) == ["fitnets", "kd"]
    assert list(config.losses("pkkd")) == ["pkkd", "kd"]
    weights = {name: loss["weight"] for name, loss in config.losses("pkkd+fitnets").items()}
    assert weights == {"pkkd": 1.0, "fitnets": 10.0}
