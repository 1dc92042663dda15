"""True gradients of adder layers beside their surrogates."""

import jax
import numpy as np
import pytest

from experiments import gradients
from pkkd_jax import main
from pkkd_jax.ops.adder import adder_conv


def true_gradients(x, w, dy, stride, padding):
    """dx and dw of the L1 distance, place by place, in float64."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    sides = (0, 0), (padding, padding), (padding, padding), (0, 0)
    padded = np.pad(x, sides)
    dx, dw = np.zeros_like(padded), np.zeros_like(w)
    height, width = w.shape[:2]
    for n, i, j in np.ndindex(dy.shape[:3]):
        rows, columns = (slice(p * stride, p * stride + s) for p, s in ((i, height), (j, width)))
        sign = np.sign(padded[n, rows, columns][..., None] - w)
        dx[n, rows, columns] -= (dy[n, i, j] * sign).sum(-1)
        dw += dy[n, i, j] * sign
    return dx[:, padding : dx.shape[1] - padding, padding : dx.shape[2] - padding], dw


@pytest.mark.parametrize(("stride", "padding", "size"), [(1, 1, 3), (2, 1, 3), (2, 0, 1)])
def test_true_gradients_are_those_of_the_distance(stride, padding, size):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 7, 5, 3))
    w = jax.random.normal(keys[1], (size, size, 3, 4))
    arguments = dict(features=4, kernel_size=(size, size), strides=(stride,) * 2, padding=padding)

    def surrogate(x, w):
        return adder_conv(x, w, strides=stride, padding=padding)

    y, surrogates = jax.vjp(surrogate, x, w)
    dy = jax.random.normal(keys[2], y.shape)
    wanted_dx, wanted_dw = true_gradients(x, w, dy, stride, padding)
    for layer, dx in (
        (gradients.TrueFilters, surrogates(dy)[0]),
        (gradients.TrueLayer, wanted_dx),
    ):
        found, pull_back = jax.vjp(
            lambda x, w, layer=layer: layer(**arguments).apply({"params": {"filters": w}}, x), x, w
        )
        np.testing.assert_allclose(found, y, rtol=1e-5, atol=1e-5)
        found_dx, found_dw = pull_back(dy)
        np.testing.assert_allclose(found_dx, dx, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found_dw, wanted_dw, rtol=1e-5, atol=1e-5)


def test_above_the_last_layer_no_inputs_gradient_matters(kernel_run, capsys):
    found = gradients.cosines(kernel_run, batches=2)
    assert len(found) == 8
    assert all(-1 <= value <= 1 for each in found.values() for value in each.values())
    last, first = found["stage3_block1.conv2"], found["stage1_block1.conv1"]
    for loss in ("ce", "all"):
        assert last[f"{loss}, filters"] == pytest.approx(last[f"{loss}, everywhere"], abs=1e-4)
        assert first[f"{loss}, filters"] != pytest.approx(first[f"{loss}, everywhere"], abs=1e-4)
    capsys.readouterr()
    assert gradients.main([str(kernel_run), "--batches=2"]) == 0
    assert f"| {last['ce, filters']:.3f} |" in capsys.readouterr().out


def test_a_run_of_another_kind_is_refused(tmp_path, capsys):
    assert gradients.main([str(tmp_path)]) == 2
    assert "holds no config.json" in capsys.readouterr().err
    arguments = ["--config=configs/quickstart.py:distill=none", f"--workdir={tmp_path / 'cnn'}"]
    arguments += ["--config.steps=1", "--config.eval.recalibrate_batches=1"]
    assert (
        main.main(["main", *arguments, "--config.teacher.mode=none", "--config.student.conv=conv"])
        == 0
    )
    assert gradients.main([str(tmp_path / "cnn")]) == 2
    assert "conv='conv': choose a run of an adder network" in capsys.readouterr().err
