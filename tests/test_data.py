"""Batches: the stream, its shards, evaluation, held-out images; and augmentation on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pkkd_jax import data
from pkkd_jax.data.arrays import ArraySource
from pkkd_jax.data.order import example_indices
from pkkd_jax.names import UserError


def source(count=23, augmentation="none"):
    images = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 1), np.uint8)
    return ArraySource(
        images, np.arange(count, dtype=np.int32), count, (0.0,), (1.0,), augmentation
    )


def labels(num_devices, start=0, stop=5, **arguments):
    batches = data.train_batches(
        source(),
        batch_size=8,
        seed=3,
        start_step=start,
        stop_step=stop,
        num_devices=num_devices,
        **arguments,
    )
    return [batch["label"] for batch in batches]


def test_each_epoch_visits_each_example_once_though_batches_cross_its_border():
    stream = np.concatenate([b.ravel() for b in labels(1, 0, 23)])
    assert len(stream) == 8 * 23
    for epoch in stream.reshape(8, 23):
        assert sorted(epoch) == list(range(23))
    assert (stream[:23] != stream[23:46]).any()


def test_the_stream_is_a_function_of_seed_and_step():
    np.testing.assert_array_equal(labels(1, 3, 5), labels(1, 0, 5)[3:])
    assert (example_indices(0, 23, np.arange(23)) != example_indices(1, 23, np.arange(23))).any()


@pytest.mark.parametrize("accumulate_steps", [1, 2])
def test_shards_of_devices_and_processes_are_the_one_batch(accumulate_steps):
    whole = labels(1, accumulate_steps=accumulate_steps)
    halves = [
        labels(4, device_slice=part, accumulate_steps=accumulate_steps) for part in ((0, 2), (2, 4))
    ]
    for one, *parts in zip(whole, *halves, strict=True):
        four = np.concatenate(parts)  # [devices, k, b]
        np.testing.assert_array_equal(four.swapaxes(0, 1).ravel(), one.ravel())


@pytest.mark.parametrize(("batch_size", "devices"), [(8, 1), (5, 4), (23, 2), (64, 4)])
def test_evaluation_counts_each_image_once(batch_size, devices):
    shares = [(0, devices)] if devices == 1 else [(0, devices // 2), (devices // 2, devices)]
    seen, counts = [], set()
    for share in shares:
        batches = list(
            data.eval_batches(
                source(), batch_size=batch_size, num_devices=devices, device_slice=share
            )
        )
        counts.add(len(batches))
        seen += [label for b in batches for label in b["label"][b["mask"] == 1]]
    assert sorted(seen) == list(range(23))
    assert len(counts) == 1


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"batch_size=8.*3 devices"):
        labels(3)


def augmented(images, positions, augmentation="crop_flip"):
    return data.augment(
        jax.random.key(5), images, positions, augmentation=augmentation, mean=(0.0,), std=(1.0,)
    )


def test_augmentation_does_not_depend_on_the_split_of_the_batch():
    images = np.random.default_rng(0).integers(0, 256, (8, 9, 7, 1), np.uint8)
    whole = augmented(images, jnp.arange(8))
    parts = [augmented(images[i : i + 2], jnp.arange(i, i + 2)) for i in range(0, 8, 2)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_crop_flip_is_a_shifted_window_of_the_padded_image_perhaps_mirrored():
    images = np.random.default_rng(0).integers(1, 256, (64, 9, 7, 1), np.uint8)
    found = np.asarray(augmented(images, jnp.arange(64)))
    seen = set()
    for image, result in zip(images, found, strict=True):
        padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
        matches = [
            (i, j, flip)
            for i in range(9)
            for j in range(9)
            for flip in (False, True)
            if (padded[i : i + 9, j : j + 7][:, :: -1 if flip else 1] == result).all()
        ]
        assert len(matches) == 1
        seen.update(matches)
    assert {flip for *_, flip in seen} == {False, True}
    assert len({i for i, *_ in seen}) == 9


def test_without_augmentation_images_are_only_normalised():
    images = np.full((2, 3, 3, 1), 200, np.uint8)
    result = data.augment(
        jax.random.key(0), images, jnp.arange(2), augmentation="none", mean=(100.0,), std=(50.0,)
    )
    np.testing.assert_allclose(result, 2.0)


def test_digits_are_split_once_into_1437_and_360():
    train, test = (data.build_source(split, name="digits") for split in ("train", "test"))
    assert (len(train), len(test), train.image_shape) == (1437, 360, (8, 8, 1))
    assert train[0]["image"].dtype == np.uint8
    assert set(train.labels) == set(test.labels) == set(range(10))
    np.testing.assert_allclose(train.images.mean(), train.mean[0], atol=0.5)
    np.testing.assert_allclose(train.images.std(), train.std[0], atol=0.5)


def test_validation_images_are_held_out_of_the_training_ones():
    def found(split, **keywords):
        source = data.build_source(split, name="digits", **keywords)
        return [source.images[i].tobytes() for i in range(len(source))]

    everything = found("train")
    train, held_out = (found(split, validation=200) for split in ("train", "validation"))
    assert len(held_out) == 200
    assert sorted([*train, *held_out]) == sorted(everything)
    assert held_out == found("validation", validation=200)
    assert found("test", validation=200) == found("test")


@pytest.mark.parametrize("validation", [-1, 1437])
def test_more_validation_images_than_there_are_is_refused(validation):
    with pytest.raises(UserError, match=rf"validation={validation}.*1437 training images"):
        data.build_source("validation", name="digits", validation=validation)
