"""What analysis reads out of a run: responses, similarity, distributions, and pictures."""

import dataclasses
import io
import itertools
import json
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from tensorboardX.proto import event_pb2
from trainings import MINE, QUICKSTART, command

from pkkd_jax import analysis, distill, experiment, main, report
from pkkd_jax.analysis import plots
from pkkd_jax.names import UserError
from pkkd_jax.nn import AdderConv, Outputs


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def run_dir(kernel_run):
    return kernel_run


@pytest.fixture(scope="module")
def run(run_dir):
    return analysis.load(run_dir)


@pytest.fixture(scope="module")
def examples(run):
    return analysis.examples(run, 40)


@pytest.fixture(scope="module")
def stages(run, examples):
    return analysis.responses(run, examples[0])


def untrained(argument, **leaves):
    """What a training of the quickstart starts from."""
    config = runpy.run_path(QUICKSTART)["get_config"](argument)
    config.update_from_flattened_dict(leaves)
    built = experiment.build(config)
    return analysis.of_state(built, built.initial_state())


def test_every_kept_checkpoint_can_be_loaded(run_dir):
    steps = analysis.saved_steps(run_dir)
    assert steps == [4, 8, 11, 12]  # of evaluations, and the latest two
    weights = [analysis.filters(analysis.load(run_dir, step).networks["student"]) for step in steps]
    layer = "stage1_block1/conv1"
    assert all((a[layer] != b[layer]).any() for a, b in itertools.pairwise(weights))
    with pytest.raises(UserError, match=r"step=5.*\[4, 8, 11, 12\]"):
        analysis.load(run_dir, 5)


def test_examples_are_the_same_ones_always_and_normalised(run, examples):
    again = analysis.examples(run, 40)
    for one, other in zip(examples, again, strict=True):
        np.testing.assert_array_equal(one, other)
    images, labels = analysis.examples(run, 10_000, split="train")
    assert len(images) == len(labels) == 1437
    np.testing.assert_allclose((images.mean(), images.std()), (0, 1), atol=0.01)
    assert len(analysis.examples(run)[0]) == 256
    with pytest.raises(UserError, match="count=-1"):
        analysis.examples(run, -1)
    with pytest.raises(UserError, match=r"unknown split 'validation'.*test, train"):
        analysis.examples(run, 8, "validation")  # the run held out none


def test_responses_are_those_of_the_networks(run, examples, stages):
    for which, network in run.networks.items():
        features = network.outputs(examples[0]).features
        for tap, response in stages["raw"][which].items():
            np.testing.assert_array_equal(response, features[tap])
    assert list(stages) == ["raw", "kernel", "rho"]
    taps = [f"stage{i}.block1.conv2" for i in (1, 2, 3)]
    assert all(list(found) == taps for sides in stages.values() for found in sides.values())


def test_kernels_are_exponentials_of_responses(run, stages):
    for tap, sigma in run.losses["pkkd"]["sigma"].items():
        for which in ("student", "teacher"):
            z = stages["raw"][which][tap].astype(np.float64)
            wanted = np.exp(z / (2 * np.exp(np.float64(sigma[which]))))
            np.testing.assert_allclose(stages["kernel"][which][tap], wanted, rtol=1e-4)
    assert stages["kernel"]["student"][tap].max() <= 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel": False},
        {"shared_sigma": True, "learn_rho_teacher": True},
        {"batch_norm": False},
        {"learn_rho_student": False},
    ],
)
def test_the_loss_is_the_mean_square_of_what_rho_returns(options, run, examples):
    loss = distill.build({"pkkd": {"weight": 1.0, **options}}, 1)["pkkd"][1]
    outputs = {name: network.outputs(examples[0]) for name, network in run.networks.items()}
    params = loss.init(jax.random.key(0), **outputs)
    for tree in params["rho"].values():  # of the identity, which it starts from
        for side, matrix in tree.items():
            noise = jax.random.normal(jax.random.key(1), matrix.shape)
            tree[side] = matrix + 0.1 * noise
    found = loss.stages(params, **outputs)["rho"]
    squares = [
        np.square(np.float64(a) - np.float64(found["teacher"][tap])).mean()
        for tap, a in found["student"].items()
    ]
    wanted = loss.apply(params, outputs["student"], outputs["teacher"], None)[0]
    np.testing.assert_allclose(np.mean(squares), wanted, rtol=2e-3)


def test_runs_without_pkkd_have_raw_responses(examples):
    found = analysis.responses(untrained("distill=kd"), examples[0])
    assert list(found) == ["raw"]
    assert list(found["raw"]) == ["student", "teacher"]
    alone = untrained("distill=none", **{"teacher.mode": "none"})
    assert list(analysis.responses(alone, examples[0])["raw"]) == ["student"]
    other = analysis.responses(untrained("distill=kd,teacher=vgg_small"), examples[0])["raw"]
    assert list(other["teacher"]) == [f"conv{i}" for i in range(1, 6)]
    assert analysis.similarities({"raw": other}) == {"raw": {}}


def test_what_learns_nothing_need_not_be_stored(examples):
    nothing = {"distill.pkkd.kernel": False, "distill.pkkd.learn_rho_student": False}
    start = untrained(None, **nothing)
    stored = dataclasses.replace(start, losses={})  # as a checkpoint has it
    found, wanted = (analysis.responses(each, examples[0]) for each in (stored, start))
    assert list(found) == ["raw", "rho"]
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_fixed_teacher_has_its_running_statistics(run_dir, examples):
    fixed = {"teacher.mode": "fixed", "teacher.run_dir": str(run_dir)}
    teacher = untrained(None, **fixed).networks["teacher"]
    logits = teacher.model.apply(teacher.variables, examples[0], train=False).logits
    np.testing.assert_array_equal(teacher.outputs(examples[0]).logits, logits)


def test_parts_from_outside_are_imported_if_trusted_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = command(tmp_path / "run", "--config.eval.pictures=1")
    arguments[1] += ":distill=mine.logits,student=mine.Net,data=mine.data"
    monkeypatch.setattr(analysis, "write_events", lambda *_: 1 / 0)
    assert main.main(arguments) == 0  # whatever becomes of the pictures
    assert "no pictures: ZeroDivisionError" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"mine\.Net.*trust=True"):
        analysis.load(tmp_path / "run")
    mine = analysis.load(tmp_path / "run", trust=True)
    with pytest.raises(UserError, match=r"mine\.data.*trust=True"):
        analysis.examples(mine, 8)
    images, _ = analysis.examples(mine, 8, trust=True)
    shares = analysis.zero_shares(mine.networks["student"], images)
    assert len(shares) == 3  # two convolutions and a classifier, named by Flax
    assert all(0 <= share <= 1 for share in shares.values())
    assert report.main([str(tmp_path / "run"), "--images=8"]) == 2
    assert report.main([str(tmp_path / "run"), "--images=8", "--trust"]) == 0


class Unusual(linen.Module):
    """Half of its classifier's inputs are zeros, and as many as are left are dropped."""

    @linen.compact
    def __call__(self, x, *, train):
        x = linen.remat(linen.Dense)(8, name="hidden")(x.reshape(len(x), -1))
        x = jnp.concatenate([x, jnp.zeros_like(x)], -1)
        x = linen.Dropout(0.5, deterministic=not train)(x)
        return Outputs(linen.Dense(3, name="classifier")(inputs=x), {})


def test_dropout_makes_no_zeros_and_layers_may_be_wrapped_and_called_by_keywords():
    images = rng().normal(size=(5, 4, 4, 1)).astype(np.float32)
    variables = Unusual().init(jax.random.key(0), images, train=False)
    shares = analysis.zero_shares(analysis.Network(Unusual(), variables), images)
    assert shares == {"hidden": 0.0, "classifier": 0.5}


def test_zero_shares_are_of_each_layers_input(run, examples):
    student = run.networks["student"]
    shares = analysis.zero_shares(student, examples[0])
    features = student.outputs(examples[0]).features
    assert shares["stem"] == pytest.approx((examples[0] == 0).mean())
    handed_on = {"stage1_block1/conv1": "stem.out", "stage2_block1/conv1": "stage1.block1.out"}
    for layer, tap in handed_on.items():
        assert shares[layer] == pytest.approx(float((features[tap] == 0).mean()))
        assert 0 < shares[layer] < 1
    # Behind a ReLU, which no tap shows.
    assert 0 < shares["stage1_block1/conv2"] < 1


class OneAdder(linen.Module):
    """An adder layer with every field that its responses depend on, and a classifier."""

    @linen.compact
    def __call__(self, x, *, train):
        del train
        x = AdderConv(6, (3, 2), (2, 1), [(1, 0), 2], 1, (1, 2), 2, name="adder")(x)
        return Outputs(linen.Dense(3, name="classifier")(x.mean((1, 2))), {})


def test_linear_shares_are_correlations_with_a_convolution_by_signs():
    images = rng().normal(size=(3, 7, 6, 4)).astype(np.float32)
    model = OneAdder()
    variables = model.init(jax.random.key(0), images, train=False)
    shares = analysis.linear_shares(analysis.Network(model, variables), images)
    w = np.float64(variables["params"]["adder"]["filters"])
    padded = np.pad(np.float64(images), ((0, 0), (1, 0), (2, 2), (0, 0)))
    adder, linear = np.empty((2, 3, 3, 8, 6))
    for n, i, j, o in np.ndindex(adder.shape):
        group = slice(0, 2) if o < 3 else slice(2, 4)
        patch = padded[n, 2 * i : 2 * i + 3, j : j + 3 : 2, group]
        adder[n, i, j, o] = -np.abs(patch - w[..., o]).sum()
        linear[n, i, j, o] = (patch * np.sign(w[..., o])).sum()
    rows = [(adder[..., o].ravel(), linear[..., o].ravel()) for o in range(6)]
    expected = np.mean([np.corrcoef(*pair)[0, 1] ** 2 for pair in rows])
    assert shares == {"adder": pytest.approx(expected, rel=1e-4)}
    # Filters that no input reaches make a linear layer.
    variables["params"]["adder"]["filters"] = 9 * np.sign(w)
    shares = analysis.linear_shares(analysis.Network(model, variables), images)
    assert shares == {"adder": pytest.approx(1, abs=1e-4)}


def test_sigma_history_is_what_the_training_logged(run_dir, run):
    history = analysis.sigma_history(run_dir)
    for tap, sigma in run.losses["pkkd"]["sigma"].items():
        assert list(history[tap]["step"]) == sorted(history[tap]["step"])
        first, last = history[tap]["student"][[0, -1]]
        assert first != last
        assert last == pytest.approx(np.exp(sigma["student"] / 2), rel=0.2)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    logged = [r[k] for r in rows if (k := f"train/student/sigma_student/{tap}") in r]
    np.testing.assert_array_equal(history[tap]["student"], logged)


def test_tensorboard_gets_histograms_and_pictures_at_the_interval_asked_for(run_dir):
    kinds, steps = {}, set()
    for path in sorted((run_dir / "tensorboard" / "pictures").iterdir()):
        for event in events(path):
            for value in event.summary.value:
                kind = value.WhichOneof("value")
                if kind != "simple_value":
                    kinds[value.tag] = kind
                    steps.add(event.step)
    assert steps == {8}  # the second of three evaluations
    assert kinds["filters/student/stage1_block1/conv1"] == "histo"
    assert {f"{stage}/teacher/stage2.block1.conv2" for stage in ("raw", "kernel", "rho")} <= set(
        kinds
    )
    assert {tag for tag, kind in kinds.items() if kind == "image"} == {
        "cka/raw", "cka/kernel", "cka/rho", "filters", "penultimate"
    }  # fmt: skip


def events(path):
    """The records of a TensorBoard file: length, checksum, record, checksum."""
    content, place = path.read_bytes(), 0
    while place < len(content):
        size = int.from_bytes(content[place : place + 8], "little")
        yield event_pb2.Event.FromString(content[place + 12 : place + 12 + size])
        place += 16 + size


def test_linear_cka_equals_its_formula_in_feature_space():
    a, b = rng().normal(5, 1, (23, 3, 2, 4)), rng(1).normal(-300, 2, (23, 7))
    b[:, :3] += 2 * a.reshape(23, -1)[:, :3]
    x, y = (each.reshape(23, -1) - each.reshape(23, -1).mean(0) for each in (a, b))
    wanted = np.linalg.norm(y.T @ x) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
    assert analysis.linear_cka(a, b) == pytest.approx(wanted)
    assert analysis.linear_cka(a.astype(np.float32), b.astype(np.float32)) == pytest.approx(wanted)


@pytest.mark.parametrize("measure", [analysis.linear_cka, analysis.rbf_cka])
def test_cka_ignores_rotation_scale_and_shift_and_nothing_else(measure):
    a = rng().normal(size=(19, 6))
    rotation = np.linalg.qr(rng(1).normal(size=(6, 6)))[0]
    assert measure(a, 3 * a @ rotation + 7) == pytest.approx(1)
    assert measure(a, a * np.arange(1, 7)) < 0.99
    assert measure(a, a[::-1]) < 0.9
    assert measure(a, np.ones((19, 2))) == 0


def test_rbf_gram_equals_its_definition():
    a = rng().normal(size=(9, 2, 3))
    distances = np.array([[np.linalg.norm(x - y) for y in a] for x in a])
    median = np.sqrt(np.median(np.square(distances[np.triu_indices(9, 1)])))
    wanted = np.exp(-(distances**2) / (2 * (0.5 * median) ** 2))
    np.testing.assert_allclose(analysis.rbf_gram(a, 0.5), wanted, rtol=1e-6)


def test_cka_of_many_is_that_of_each_pair():
    a = {"a": rng().normal(size=(11, 3)), "b": rng(1).normal(size=(11, 4))}
    b = {"c": rng(2).normal(size=(11, 2))}
    found = analysis.cka(a, b)
    assert found.shape == (2, 1)
    assert found[1, 0] == analysis.linear_cka(a["b"], b["c"])
    with pytest.raises(UserError, match="'d': 10"):
        analysis.cka(a, {"d": np.ones((10, 2))})


def test_effective_rank_and_variance_count_directions():
    signals = rng().normal(size=(50, 20, 20, 2))
    mixed = signals @ rng(1).normal(size=(2, 9))
    assert 1 < analysis.effective_rank(mixed + 5) <= 2
    assert analysis.effective_rank(3 * rng().normal(size=(40_000, 6))) == pytest.approx(6, abs=0.01)
    assert analysis.effective_rank(np.ones((5, 4))) == 0
    assert analysis.variance(3 * signals - 1) == pytest.approx(9, rel=0.05)


@pytest.mark.parametrize("better", ["laplace", "gauss"])
def test_a_fit_recovers_the_distribution_and_says_which_it_is(better):
    draw = rng().laplace if better == "laplace" else rng().normal
    found = analysis.fit(draw(0.5, 2.0, (30, 100)))
    assert found.better == better
    assert (found.z > 5) == (better == "laplace")
    location = found.median if better == "laplace" else found.mean
    width = found.scale if better == "laplace" else found.std
    assert (location, width) == (pytest.approx(0.5, abs=0.15), pytest.approx(2.0, rel=0.05))


def test_a_fit_equals_its_formulas():
    x = rng().standard_t(4, 501)
    found, scale = analysis.fit(x), np.abs(x - np.median(x)).mean()
    gauss = -((x - x.mean()) ** 2) / (2 * x.var()) - np.log(2 * np.pi * x.var()) / 2
    laplace = -np.abs(x - np.median(x)) / scale - np.log(2 * scale)
    z = np.sqrt(501) * (laplace - gauss).mean() / (laplace - gauss).std()
    got = found.mean, found.std, found.median, found.scale, found.gauss, found.laplace, found.z
    wanted = x.mean(), x.std(), np.median(x), scale, gauss.mean(), laplace.mean(), z
    np.testing.assert_allclose(got, wanted)


def test_few_values_tell_nothing():
    assert analysis.fit([0.0, 1.0, 3.0]).better == "neither"
    with pytest.raises(UserError, match="all equal"):
        analysis.fit(np.ones(5))


def test_filters_are_all_convolutions_in_forward_order(run):
    found = analysis.filters(run.networks["student"])
    assert list(found)[:4] == ["stem", "stage1_block1/conv1", "stage1_block1/conv2",
                               "stage2_block1/conv1"]  # fmt: skip
    assert found["stage3_block1/conv2"].shape == (3, 3, 64, 64)
    assert set(found) == set(analysis.filters(run.networks["teacher"]))
    assert not any("classifier" in layer for layer in found)


def test_an_embedding_keeps_most_of_the_variance():
    features = rng().normal(size=(30, 5)) * (9, 7, 1, 1, 1)
    found = analysis.embedding(features)
    singular = np.linalg.svd(features - features.mean(0), compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(found, axis=0), singular[:2])
    np.testing.assert_array_equal(analysis.embedding(features[:, :2]), features[:, :2])
    assert analysis.embedding(features, "tsne").shape == (30, 2)
    for method in ("pca", "tsne"):  # of a network that has collapsed
        np.testing.assert_array_equal(
            analysis.embedding(np.ones((30, 5)), method), np.zeros((30, 2))
        )
    with pytest.raises(UserError, match="not finite"):
        analysis.embedding(features * np.nan)
    with pytest.raises(UserError, match="'umap'"):
        analysis.embedding(features, "umap")


def drawn(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=50)
    assert file.getvalue().startswith(b"\x89PNG")
    return figure


@pytest.mark.filterwarnings("error")
def test_every_picture_is_drawn_with_axes_that_say_what_they_show(run_dir, run, examples, stages):
    images, labels = examples
    filters = {which: analysis.filters(network) for which, network in run.networks.items()}
    features = {
        w: network.outputs(images).features["penultimate"] for w, network in run.networks.items()
    }
    taps = list(stages["raw"]["student"])
    matrix = analysis.cka(stages["raw"]["student"], stages["raw"]["teacher"])
    shares = {w: analysis.zero_shares(network, images) for w, network in run.networks.items()}
    figures = [
        plots.learning_curves({"": run_dir}),
        plots.learning_curves({"one": run_dir, "two": run_dir}),
        plots.by_layer(shares, "share of zeros", (0, 1)),
        plots.filter_histograms(filters),
        plots.response_histograms(stages, taps[0]),
        plots.cka_heatmaps({"step 12": matrix, "step 8": matrix}, taps, taps),
        plots.class_scatter({w: analysis.embedding(f) for w, f in features.items()}, labels),
        plots.filter_images(filters["student"]["stage1_block1/conv1"]),
        plots.sigmas(analysis.sigma_history(run_dir)),
    ]
    for figure in figures:
        axes = drawn(figure).axes
        assert all(each.get_xlabel() or each.get_ylabel() for each in axes)
    with pytest.raises(UserError, match=r"tap='stem'.*stage1\.block1\.conv2"):
        plots.response_histograms(stages, "stem")


def test_curves_of_one_run_show_seen_and_unseen_of_several_unseen_alone(run_dir):
    one = plots.learning_curves({"": run_dir}).axes[1].get_legend_handles_labels()[1]
    assert one == ["student, train", "student, test", "teacher, train", "teacher, test"]
    two = plots.learning_curves({"a": run_dir, "b": run_dir}).axes[1].get_legend_handles_labels()[1]
    assert two == ["a, student, test", "a, teacher, test", "b, student, test", "b, teacher, test"]
