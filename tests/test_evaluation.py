"""Evaluation and recalibration."""

import jax
import numpy as np
from test_update import AUGMENTATION, assert_equal, examples, initial, recipe

from pkkd_jax import data, devices, evaluation


def test_evaluation_leaves_padding_out():
    model, variables = recipe().teacher, initial().teacher.variables
    images, labels = examples(7)
    mapped = devices.pmap(evaluation.sums(model, AUGMENTATION["mean"], AUGMENTATION["std"]))
    filled = np.concatenate([images, images[:1]]), np.append(labels, labels[0])
    mask = np.array([1, 1, 1, 1, 1, 1, 1, 0], np.float32)
    padded = {"image": filled[0], "label": filled[1], "mask": mask}
    padded = {key: value.reshape(4, 2, *value.shape[1:]) for key, value in padded.items()}
    found = evaluation.evaluate({"teacher": (mapped, variables)}, [padded])["teacher"]
    logits = np.float64(
        model.apply(variables, (images - np.float32(120)) / np.float32(60), train=False).logits
    )
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(found["loss"], -log_p[np.arange(7), labels].mean(), rtol=1e-4)
    assert found["accuracy"] == (logits.argmax(-1) == labels).mean()
    best = np.argsort(-logits)[:, :5]
    assert found["top5"] == np.mean([label in row for label, row in zip(labels, best, strict=True)])


def test_recalibration_pools_batches_and_keeps_parameters():
    model, variables = recipe().student, initial().student.variables
    images, _ = examples()
    mapped = devices.pmap(
        evaluation.batch_statistics(model, AUGMENTATION | {"augmentation": "none"})
    )
    halves = [{"image": part.reshape(2, 1, 4, 8, 8, 3)} for part in (images[:8], images[8:])]
    found = evaluation.recalibrate({"student": (mapped, variables)}, halves)["student"]
    assert_equal(found["params"], variables["params"])
    whole = (images - np.float32(120)) / np.float32(60)
    outputs, _ = model.apply(variables, whole, train=True, mutable=["batch_stats"])
    stem = np.float64(outputs.features["stem"])
    np.testing.assert_allclose(
        found["batch_stats"]["stem_bn"]["mean"], stem.mean((0, 1, 2)), rtol=1e-3, atol=1e-5
    )
    np.testing.assert_allclose(
        found["batch_stats"]["stem_bn"]["var"], stem.var((0, 1, 2)), rtol=1e-3, atol=1e-5
    )


def test_recalibration_augments_as_the_training_does():
    model, variables = recipe().student, initial().student.variables
    images, _ = examples()
    found = {}
    for augmentation in ("none", "crop_flip"):
        arguments = AUGMENTATION | {"augmentation": augmentation}
        mapped = devices.pmap(evaluation.batch_statistics(model, arguments))
        stats = mapped(variables, {"image": images.reshape(4, 1, 4, 8, 8, 3)})
        found[augmentation] = np.asarray(stats["stem_bn"]["mean"])
    augmented = data.augment(jax.random.key(0), images, np.arange(16), **AUGMENTATION)
    outputs, _ = model.apply(variables, augmented, train=True, mutable=["batch_stats"])
    wanted = np.float64(outputs.features["stem"]).mean((0, 1, 2))
    np.testing.assert_allclose(found["crop_flip"], wanted, rtol=1e-3, atol=1e-5)
    assert np.abs(found["crop_flip"] - found["none"]).max() > 1e-3
