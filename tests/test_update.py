"""The joint update."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pkkd_jax import devices, models, optim, update
from pkkd_jax.distill.attention import attention_transfer
from pkkd_jax.distill.correlation import correlation_congruence
from pkkd_jax.distill.fitnets import fitnets
from pkkd_jax.distill.fsp import fsp
from pkkd_jax.distill.kd import kd
from pkkd_jax.distill.pkkd import pkkd
from pkkd_jax.distill.pkt import pkt
from pkkd_jax.distill.relational import relational
from pkkd_jax.distill.similarity import similarity_preserving
from pkkd_jax.recipe import Recipe, hyperparameters, init_state

AUGMENTATION = dict(augmentation="crop_flip", mean=(120.0,) * 3, std=(60.0,) * 3)


def recipe(**changes):
    build = functools.partial(models.build, "resnet_cifar", depth=8, num_classes=10)
    fields = dict(
        student=build(conv="adder"),
        teacher=build(conv="conv"),
        teacher_learns=True,
        losses={"pkkd": (1.0, pkkd()), "kd": (1.0, kd())},
        alpha=1.0,
        optimiser=optim.build(100, momentum=0.9),
        distiller_optimiser=optax.sgd(0.1, momentum=0.9),
        augmentation=AUGMENTATION,
        seed=0,
    )
    return Recipe(**{**fields, **changes})


def examples(count=16, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 8, 8, 3), np.uint8), rng.integers(0, 10, count, np.int32)


def batch(count, micro_batches=1):
    def split(a):
        shaped = a.reshape(micro_batches, count, -1, *a.shape[1:])
        return np.ascontiguousarray(shaped.swapaxes(0, 1))

    images, labels = examples()
    return {"image": split(images), "label": split(labels)}


@functools.cache
def initial():
    return jax.device_get(init_state(recipe(), examples()[0]))


def run(the_recipe, state, count=1, steps=2, micro_batches=1):
    step = devices.pmap(update.joint_update(the_recipe), hyperparameters(the_recipe))
    for _ in range(steps):
        state, metrics = step(state, batch(count, micro_batches))
        state, metrics = jax.device_get((state, metrics))
    return state, metrics


def assert_close(a, b, tolerance):
    def check(x, y):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)

    jax.tree.map(check, a, b)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differs(a, b):
    return any(
        (np.asarray(x) != np.asarray(y)).any()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@functools.cache
def one_step():
    return run(recipe(), initial(), steps=1)[0]


@functools.cache
def one_device():
    return run(recipe(), initial())


# After more steps a rounding can carry a response over a kink of ReLU, and its filter with it.
@pytest.mark.parametrize(("steps", "tolerance"), [(1, 1e-4), (2, 1e-2)])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_four_devices_equal_one(micro_batches, steps, tolerance):
    four, one = (run(recipe(), initial(), count, steps, micro_batches) for count in (4, 1))

    def check(a, b):
        a, b = np.float64(a), np.float64(b)
        difference, size = np.linalg.norm(a - b), np.linalg.norm(b)
        assert difference <= tolerance * size + 1e-6

    jax.tree.map(check, four, one)


def test_the_update_compiles_once():
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: compiled.append(event) if "backend_compile" in event else None
    )
    given = hyperparameters(recipe())
    step = devices.pmap(update.joint_update(recipe()), given, donate=True)
    state, counts = devices.replicate(initial()), []
    for _ in range(3):
        before = len(compiled)
        state, metrics = step(state, batch(4))
        jax.block_until_ready(metrics)
        counts.append(len(compiled) - before)
    jax.monitoring.clear_event_listeners()
    assert counts[0] > 0
    assert counts[1:] == [0, 0]


def test_seed_and_weights_share_one_program():
    def program(the_recipe):
        mapped = jax.vmap(
            update.joint_update(the_recipe),
            axis_name=devices.AXIS,
            in_axes=(None, 0, None),
            out_axes=None,
        )
        return jax.jit(mapped).lower(initial(), batch(1), hyperparameters(the_recipe))

    losses = {"pkkd": (3.0, pkkd()), "kd": (0.0, kd())}
    other = recipe(seed=5, alpha=0.5, losses=losses)
    text = program(recipe()).as_text()
    assert program(other).as_text() == text
    assert program(recipe(label_smoothing=0.1)).as_text() != text
    state = jax.device_get(init_state(other, examples()[0]))
    assert differs(run(other, state, steps=1)[0].student, run(recipe(), state, steps=1)[0].student)


def test_augmentation_is_part_of_the_update():
    plain = recipe(augmentation={**AUGMENTATION, "augmentation": "none"})
    assert differs(run(plain, initial())[0].student.params, one_device()[0].student.params)


def test_teacher_ignores_student():
    other = jax.tree.map(lambda a: a * 1.1, initial().student.params)
    state = initial().replace(student=initial().student.replace(params=other))
    state, _ = run(recipe(alpha=3.0), state)
    assert differs(state.student.params, one_device()[0].student.params)
    assert_equal(state.teacher, one_device()[0].teacher)


def test_the_teacher_learns_the_same_whatever_is_distilled():
    losses = {
        "fitnets": fitnets(),
        "attention_transfer": attention_transfer(),
        "similarity_preserving": similarity_preserving(),
        "fsp": fsp("stage1.block1.conv1>stage1.block1.out"),
        "relational": relational(),
        "pkt": pkt(),
        "correlation_congruence": correlation_congruence(),
    }
    others = recipe(losses={name: (10.0, loss) for name, loss in losses.items()})
    state = jax.device_get(init_state(others, examples()[0]))
    assert_close(run(others, state)[0].teacher, one_device()[0].teacher, 1e-6)


def test_without_distillation_weight_the_student_ignores_the_teacher():
    free = recipe(losses={name: (0.0, loss) for name, (_, loss) in recipe().losses.items()})
    other = jax.tree.map(lambda a: a * 1.1, initial().teacher.params)
    changed = initial().replace(teacher=initial().teacher.replace(params=other))
    # Equal to rounding: XLA may order the sum of the losses' zeros differently, not the student's.
    assert_close(run(free, initial())[0].student, run(free, changed)[0].student, 1e-6)


def test_with_distillation_weight_the_student_follows_the_teacher():
    other = jax.tree.map(lambda a: a * 1.1, initial().teacher.params)
    changed = initial().replace(teacher=initial().teacher.replace(params=other))
    assert differs(run(recipe(), changed)[0].student.params, one_device()[0].student.params)


def test_a_fixed_teacher_does_not_move():
    state = initial().replace(teacher=initial().teacher.replace(opt_state=()))
    after, metrics = run(recipe(teacher_learns=False), state)
    assert_equal(after.teacher, state.teacher)
    assert differs(after.student.params, state.student.params)
    assert np.isfinite(metrics["student/loss_mid"])


def test_a_snapshot_teacher_is_the_student_of_the_last_cycle():
    adder = recipe().student
    snapshot = recipe(
        teacher=adder, teacher_learns=False, losses={"kd": (1.0, kd())}, snapshots=(2,)
    )
    alone = recipe(teacher=None, losses={})
    start = jax.device_get(init_state(snapshot, examples()[0]))
    after = {steps: run(snapshot, start, steps=steps)[0] for steps in (1, 2, 3)}
    assert_equal(after[1].teacher.variables, start.teacher.variables)
    assert_equal(after[2].teacher.variables, after[2].student.variables)
    assert_equal(after[3].teacher.variables, after[2].student.variables)
    assert differs(after[3].student.params, after[2].student.params)
    # In the first cycle it learns from the labels alone.
    start = start.replace(teacher=None)
    assert_close(run(alone, start)[0].student, after[2].student, 1e-4)


def test_a_weight_by_step_is_that_of_the_step():
    ramp = recipe(losses={"kd": (lambda step: jnp.where(step < 1, 0.0, 1.0), kd())})
    constant = {weight: recipe(losses={"kd": (weight, kd())}) for weight in (0.0, 1.0)}
    start = jax.device_get(init_state(ramp, examples()[0]))
    one = run(ramp, start, steps=1)[0]
    assert_close(one.student, run(constant[0.0], start, steps=1)[0].student, 1e-6)
    two = run(ramp, start, steps=2)[0]
    unweighted = run(constant[0.0], one, steps=1)[0].student
    assert_close(two.student, run(constant[1.0], one, steps=1)[0].student, 1e-5)
    with pytest.raises(AssertionError):
        assert_close(two.student, unweighted, 1e-5)


@pytest.mark.parametrize("weight", [0.0, 25.0])
def test_what_a_loss_learns_is_the_same_for_every_weight(weight):
    weighted = recipe(losses={"pkkd": (weight, pkkd()), "kd": (1.0, kd())})
    after, like_one = run(weighted, initial(), steps=1)[0], one_step()
    assert differs(after.student.params, like_one.student.params)
    wanted = like_one.distiller if weight else initial().distiller
    assert_close(after.distiller, wanted, 1e-5)


def test_a_network_trains_alone():
    alone = recipe(teacher=None, losses={})
    state = jax.device_get(init_state(alone, examples()[0]))
    after, metrics = run(alone, state)
    assert after.teacher is None
    assert set(metrics) == {"student/loss", "student/loss_ce", "student/accuracy", "finite"}


def test_diagnostics_of_every_tap_are_logged():
    metrics = one_device()[1]
    for tap in ("stage1.block1.conv2", "stage2.block1.conv2", "stage3.block1.conv2"):
        for what in ("sigma_student", "sigma_teacher", "rank_student", "rank_teacher", "underflow"):
            assert np.isfinite(metrics[f"student/{what}/{tap}"])


def test_label_smoothing_changes_the_loss_and_not_the_accuracy():
    smooth = run(recipe(label_smoothing=0.2), initial(), steps=1)[1]
    plain = run(recipe(), initial(), steps=1)[1]
    assert smooth["student/loss_ce"] != plain["student/loss_ce"]
    assert smooth["teacher/accuracy"] == plain["teacher/accuracy"]


def test_bfloat16_trains_float32_parameters():
    build = functools.partial(models.build, "resnet_cifar", depth=8, num_classes=10)
    half = recipe(
        student=build(conv="adder", dtype=jnp.bfloat16),
        teacher=build(conv="conv", dtype=jnp.bfloat16),
    )
    state, metrics = run(half, initial())
    assert {a.dtype for a in jax.tree.leaves(state.student.params)} == {np.dtype("float32")}
    full = one_device()[1]
    assert abs(metrics["student/loss_ce"] - full["student/loss_ce"]) < 0.3


@pytest.mark.parametrize(("count", "micro_batches"), [(1, 1), (4, 1), (1, 2)])
def test_adder_scaling_sees_the_mean_over_devices_and_micro_batches(count, micro_batches):
    plain = optax.chain(optim.scale_by_adder_norm(0.2), optax.sgd(1.0))
    fresh = initial().student.replace(opt_state=plain.init(initial().student.params))
    state = initial().replace(student=fresh, teacher=None)
    alone = recipe(optimiser=plain, teacher=None, losses={})
    after, _ = run(alone, state, count, 1, micro_batches)
    before = initial().student.params["stage2_block1"]["conv1"]["filters"]
    step = after.student.params["stage2_block1"]["conv1"]["filters"] - before
    # A mean of unit-norm gradients would be shorter.
    np.testing.assert_allclose(np.linalg.norm(step), 0.2 * np.sqrt(step.size), rtol=1e-4)
