"""Distillation losses against float64 formulations, and properties that a misreading breaks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pkkd_jax import distill
from pkkd_jax.distill.kd import kd
from pkkd_jax.distill.pkkd import effective_rank, moments, pkkd
from pkkd_jax.distill.taps import select_taps
from pkkd_jax.names import UserError
from pkkd_jax.nn import Outputs

TAPS = [
    "stem",
    "stage1.block1.conv1",
    "stage1.block1.conv2",
    "stage1.block2.conv1",
    "stage1.block2.conv2",
    "stage2.block1.conv1",
    "stage2.block1.conv2",
    "stage2.block1.shortcut",
    "penultimate",
]


def outputs(seed, scale=1.0, offset=0.0, channels=3):
    keys = jax.random.split(jax.random.key(seed), len(TAPS) + 1)
    features = {
        tap: scale * jax.random.normal(key, (6, 5, 4, channels)) - offset
        for tap, key in zip(TAPS, keys, strict=False)
    }
    return Outputs(jax.random.normal(keys[-1], (6, 10)), features)


def log_softmax(z):
    z = np.asarray(z, np.float64)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_equals_float64_formulation(temperature):
    student, teacher = outputs(0), outputs(1)
    loss, metrics = kd(temperature).apply({}, student, teacher, None)
    p = log_softmax(np.asarray(teacher.logits) / temperature)
    q = log_softmax(np.asarray(student.logits) / temperature)
    wanted = temperature**2 * (np.exp(p) * (p - q)).sum(-1).mean()
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert metrics["loss_kd"] == loss


def test_kd_is_zero_when_student_equals_teacher():
    assert abs(kd(2.0).apply({}, outputs(0), outputs(0), None)[0]) < 1e-6


def standardise(z):
    mean, variance = z.mean((0, 1, 2)), z.var((0, 1, 2))
    return (z - mean) / np.sqrt(variance + 1e-5)


@pytest.mark.parametrize("channels", [2, 3, 5])
@pytest.mark.parametrize("kernel", [True, False])
def test_pkkd_equals_float64_formulation(kernel, channels):
    student, teacher = outputs(0, 20.0, 300.0), outputs(1, channels=channels)
    loss_function = pkkd(taps="stage_ends", kernel=kernel)
    params = loss_function.init(jax.random.key(0), student, teacher)
    wanted = []
    for tap in ("stage1.block2.conv2", "stage2.block1.conv2"):
        a, c = (np.asarray(o.features[tap], np.float64) for o in (student, teacher))
        if kernel:
            a = np.exp(a / np.abs(a).mean())  # 2 sigma_a^2 = mean |z_a|
            c = np.exp(c / c.std())
        a = standardise(standardise(a) @ np.eye(3, channels))
        wanted.append(((a - standardise(c)) ** 2).mean())
    loss, metrics = loss_function.apply(params, student, teacher, None)
    np.testing.assert_allclose(loss, np.mean(wanted), rtol=1e-4)
    assert metrics["loss_mid"] == loss


def test_pkkd_kernels_survive_responses_in_the_hundreds():
    student, teacher = outputs(0, 50.0, 800.0), outputs(1, 30.0)
    loss_function = pkkd()
    params = loss_function.init(jax.random.key(0), student, teacher)

    def loss(params):
        return loss_function.apply(params, student, teacher, None)

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    assert all(v == 0 for k, v in metrics.items() if k.startswith("underflow/"))


def test_pkkd_reports_underflow_of_a_sigma_too_small():
    student, teacher = outputs(0, 50.0, 800.0), outputs(1)
    loss_function = pkkd(initial_sigma=1.0)
    params = loss_function.init(jax.random.key(0), student, teacher)
    metrics = loss_function.apply(params, student, teacher, None)[1]
    assert metrics["underflow/stage1.block1.conv2"] > 0.99


def test_only_the_learnt_sigmas_get_a_gradient():
    student, teacher = outputs(0, 5.0, 100.0), outputs(1)
    for learns_student, learns_teacher in ((True, False), (False, True)):
        loss_function = pkkd(learn_sigma_student=learns_student, learn_sigma_teacher=learns_teacher)
        params = loss_function.init(jax.random.key(0), student, teacher)
        gradient = jax.grad(lambda p, f=loss_function: f.apply(p, student, teacher, None)[0])(
            params
        )
        for sigma in gradient["sigma"].values():
            assert bool(sigma["student"] != 0) == learns_student
            assert bool(sigma["teacher"] != 0) == learns_teacher


@pytest.mark.parametrize(
    "option",
    [
        {"shared_sigma": True},
        {"learn_rho_teacher": True},
        {"learn_rho_student": False},
        {"batch_norm": False},
        {"taps": "all"},
        {"max_exponent": 0.1},
        {"taps": "stage1.block1.conv1, stage2.block1.shortcut"},
    ],
    ids=str,
)
def test_every_option_of_pkkd_changes_the_loss_or_its_parameters(option):
    student, teacher = outputs(0, 5.0, 100.0), outputs(1)

    def value(loss_function):
        params = loss_function.init(jax.random.key(0), student, teacher)
        loss = float(loss_function.apply(params, student, teacher, None)[0])
        assert np.isfinite(loss)
        return loss, jax.tree.structure(params)

    assert value(pkkd(**option)) != value(pkkd())


def test_taps_are_selected_in_forward_order_without_stem_and_penultimate():
    features = dict.fromkeys(TAPS)
    assert select_taps(features, "all") == TAPS[1:-1]
    assert select_taps(features, "block_ends") == [
        "stage1.block1.conv2",
        "stage1.block2.conv2",
        "stage2.block1.conv2",
    ]
    assert select_taps(features, "stage_ends") == ["stage1.block2.conv2", "stage2.block1.conv2"]
    vgg = dict.fromkeys(["stem", "conv1", "conv2", "penultimate"])
    assert select_taps(vgg, "block_ends") == ["conv1", "conv2"]


def test_a_wrong_tap_is_named_with_the_nearest():
    with pytest.raises(UserError, match=r"'stage1.block1.conv9'.*did you mean"):
        select_taps(dict.fromkeys(TAPS), "stage1.block1.conv9")


def test_taps_of_different_size_are_refused():
    student, teacher = outputs(0), outputs(1)
    teacher.features["stage2.block1.conv2"] = jnp.zeros((6, 3, 4, 3))
    with pytest.raises(UserError, match=r"stage2.block1.conv2.*\[6, 5, 4, 3\].*\[6, 3, 4, 3\]"):
        pkkd().init(jax.random.key(0), student, teacher)


def test_effective_rank_counts_directions():
    z = jax.random.normal(jax.random.key(0), (32, 16, 16, 4))
    same = z[..., :1] * jnp.ones(4)
    np.testing.assert_allclose(effective_rank(moments(z, z, None)), 4, rtol=0.01)
    np.testing.assert_allclose(effective_rank(moments(same, same, None)), 1, rtol=1e-4)


def test_an_unknown_loss_or_keyword_is_named_with_the_nearest():
    with pytest.raises(UserError, match="unknown loss 'pkdd': did you mean 'pkkd'"):
        distill.build({"pkdd": {"weight": 1.0}}, 10)
    with pytest.raises(UserError, match="'temprature': did you mean 'temperature'"):
        distill.build({"kd": {"weight": 1.0, "temprature": 2.0}}, 10)
