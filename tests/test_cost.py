"""The cost counter: against counts by hand, published ones, and on the command line."""

import json

import jax
import jax.numpy as jnp
import pytest
from flax import linen
from jax import lax
from trainings import QUICKSTART, ROOT

from pkkd_jax import checkpoint, cost, data, models, nn
from pkkd_jax.cost import Layer, Operations, tables
from pkkd_jax.cost import __main__ as command_line
from pkkd_jax.names import UserError

RESNET18 = f"--config={ROOT / 'configs' / 'resnet18.py'}"


class Small(linen.Module):
    """A network that the package has never seen."""

    num_classes: int = 3
    conv: str = "conv"
    bn_axis_name: str | None = None

    @linen.compact
    def __call__(self, images, *, train):
        x = linen.Conv(6, (3, 3), strides=2, padding=1, feature_group_count=2, name="first")(images)
        x = linen.relu(linen.BatchNorm(not train, name="norm")(x))
        y = nn.convolution(self.conv)(6, (1, 1), use_bias=False, name="second")(x)
        x = linen.max_pool(x + jnp.tanh(y), (2, 2), (2, 2)).mean((1, 2))
        return linen.Dense(self.num_classes, name="head")(x)


# Of 8x8x4: 4x4x6 numbers of 3x3x2 terms each and a bias; x - mean, times, plus; max with 0.
FIRST = Layer(
    "first", mul=96 * 18, add=96 * 18 + 96, norm=Operations(96, 2 * 96),
    activation=Operations(add=96), params=18 * 6 + 6 + 12, activations=96,
)  # fmt: skip
# 4x4x6 numbers of 6 terms; tanh; x + y; 2x2x6 windows of 4, the sum of 4 places and its division.
SECOND = dict(sum=Operations(add=96), pool=Operations(6, 24 * 3 + 6 * 3), params=36, activations=96)
HEAD = Layer("head", mul=18, add=18 + 3, params=6 * 3 + 3, activations=3)


def test_a_users_own_network_is_counted_as_by_hand():
    second = Layer("second", mul=96 * 6, add=96 * 6, activation=Operations(mul=96), **SECOND)
    assert cost.count(Small(), (8, 8, 4)) == cost.Cost((FIRST, second, HEAD))


def test_its_adder_twin_adds_twice_a_term():
    second = Layer("second", add=2 * 96 * 6, activation=Operations(mul=96), **SECOND)
    assert cost.count(Small(conv="adder"), (8, 8, 4)) == cost.Cost((FIRST, second, HEAD))


def test_its_one_bit_twin_takes_an_xnor_and_an_addition_a_term():
    # The sign's two comparisons stand before the convolution that sees it.
    first, second, head = cost.count(Small(conv="binary"), (8, 8, 4)).layers
    assert first.activation == Operations(add=96 + 2 * 96)
    assert second == Layer(
        "second", add=96 * 6, xnor=96 * 6, activation=Operations(mul=96), **SECOND
    )
    assert head == HEAD


def test_energy_is_that_of_the_table():
    counted = cost.count(Small(conv="binary"), (8, 8, 4))
    total = counted.total
    mul = total.mul + 96 + 96 + 6
    add = total.add + 192 + 96 + 192 + 96 + 90
    for precision, (of_mul, of_add) in {
        "float32": (3.7, 0.9), "int32": (3.1, 0.1), "float16": (1.1, 0.4), "int8": (0.2, 0.03)
    }.items():  # fmt: skip
        of_xnor = total.xnor * 0.03 / 8
        found = counted.energy_pj(precision), counted.energy_pj(precision, layers_only=True)
        assert found[0] == pytest.approx(mul * of_mul + add * of_add + of_xnor)
        assert found[1] == pytest.approx(total.mul * of_mul + total.add * of_add + of_xnor)
    with pytest.raises(UserError, match="did you mean 'float16'"):
        counted.energy_pj("bfloat16")


def test_table_2_of_the_author_response_comes_out():
    found = cost.twins({"name": "resnet_imagenet", "depth": 18, "num_classes": 1000}, (224, 224, 3))
    in_g = {
        name: tuple(round(getattr(c.total, what) / 1e9, 1) for what in ("mul", "add", "xnor"))
        for name, c in found.items()
    }
    assert in_g == {"cnn": (1.8, 1.8, 0.0), "ann": (0.1, 3.5, 0.0), "bnn": (0.1, 1.8, 1.7)}


@pytest.mark.parametrize(
    ("name", "depth", "shape", "swapped", "others"),
    [
        ("resnet_cifar", 20, (32, 32, 3), 40.37, 0.44),
        ("resnet_cifar", 32, (32, 32, 3), 68.68, 0.44),
        ("resnet_imagenet", 18, (224, 224, 3), 1696, 119),
        ("resnet_imagenet", 50, (224, 224, 3), 3969, 120),
    ],
)
def test_terms_of_published_networks_are_counted(name, depth, shape, swapped, others):
    classes = 10 if name == "resnet_cifar" else 1000
    found = cost.twins({"name": name, "depth": depth, "num_classes": classes}, shape)
    digits = 2 if swapped < 100 else 0
    cnn, ann, bnn = (found[twin].total for twin in ("cnn", "ann", "bnn"))
    assert round(bnn.xnor / 1e6, digits) == swapped
    assert round(ann.mul / 1e6, digits) == round(bnn.mul / 1e6, digits) == others
    assert cnn.mul == ann.mul + bnn.xnor
    assert ann.add == cnn.add + bnn.xnor
    assert not any(twin.not_counted for twin in found.values())


def test_a_pkkd_student_costs_exactly_what_a_plain_ann_costs(finished):
    student, variables = checkpoint.load_network(finished[0], "student")
    plain = models.build("resnet_cifar", depth=8, num_classes=10, conv="adder")
    counted = cost.count(student, (8, 8, 1))
    assert counted == cost.count(plain, (8, 8, 1))
    assert counted.total.params == sum(a.size for a in jax.tree.leaves(variables["params"]))


def network(call):
    """A module whose `__call__` is `call(images)`."""

    class Network(linen.Module):
        @linen.compact
        def __call__(self, images, *, train):
            del train
            return call(images)

    return Network()


def total(call, shape=(4, 4, 2)) -> Layer:
    counted = cost.count(network(call), shape)
    assert not counted.not_counted
    return counted.total


class Standardised(linen.Module):
    """A matrix product with weights of mean 0 and variance 1."""

    @linen.compact
    def __call__(self, x):
        w = self.param("w", linen.initializers.normal(), (2, 3))
        return x @ ((w - w.mean()) / jnp.sqrt(w.var()))


def test_what_is_computed_of_parameters_alone_is_a_constant():
    plain = total(lambda x: linen.Dense(3, use_bias=False)(x))
    assert total(lambda x: Standardised()(x)) == plain


def test_a_scan_counts_as_often_as_it_runs():
    class Step(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            return linen.Dense(2, use_bias=False)(x), None

    def five(x):
        scan = linen.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=5)
        return scan()(x, None)[0]

    found = total(five)
    assert (found.mul, found.params, found.activations) == (5 * 32 * 2, 5 * 4, 5 * 32)


def test_a_scan_counts_nothing_of_what_it_stacks_in_vain():
    def step(x, _):
        kept, unused = x
        return (jnp.tanh(kept @ jnp.ones((2, 2))), unused @ jnp.ones((2, 2))), kept * unused

    found = total(lambda x: lax.scan(step, (x, x), length=3)[0][0])
    assert (found.mul, found.activation.mul) == (3 * 32 * 2, 3 * 32)


def test_a_condition_counts_its_dearest_branch():
    found = total(lambda x: lax.cond(x[0, 0, 0, 0] > 0, lambda x: x, lambda x: jnp.tanh(x * 2), x))
    assert found.activation == Operations(mul=2 * 32, add=1)


def test_programs_within_the_program_are_counted():
    inner = linen.remat(linen.Dense)
    found = total(lambda x: jax.jit(lambda y: y * 2)(inner(3)(x)))
    assert (found.mul, found.add) == (16 * 2 * 3, 16 * 2 * 3 + 48)
    assert found.activation == Operations(mul=48)


def test_a_layer_called_twice_has_its_parameters_once():
    def call(x):
        dense = linen.Dense(2, use_bias=False)
        return dense(dense(x))

    found = total(call)
    assert (found.mul, found.params) == (2 * 32 * 2, 4)


def test_zeros_between_the_pixels_of_a_transposed_convolution_do_not_count():
    found = total(lambda x: linen.ConvTranspose(3, (2, 2), strides=(2, 2), use_bias=False)(x))
    assert found.mul == found.add == 32 * 4 * 3


def test_a_product_of_two_feature_maps_is_counted():
    assert total(lambda x: jnp.einsum("nhwc,nhwd->ncd", x, x)).mul == 2 * 2 * 16


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x: jnp.sort(x, axis=1), "sort"),
        (lambda x: lax.while_loop(lambda x: x.max() < 5, lambda x: x + x, x), "while"),
    ],
)
def test_what_cannot_be_counted_is_named(call, name):
    counted = cost.count(network(lambda x: linen.Dense(3)(call(x))), (4, 4, 2))
    assert counted.not_counted == (name,)
    assert counted.total.mul == 16 * 2 * 3
    shown = {"student": counted}
    assert f"Not counted in the student: {name}." in cost.text(shown)
    assert cost.to_json(shown)["student"]["not_counted"] == [name]


def test_what_the_logits_do_not_need_is_not_counted():
    def call(x):
        logits = linen.Dense(3, name="head")(x.mean((1, 2)))
        return nn.Outputs(logits, {"aside": linen.Dense(7, name="aside")(x)})

    counted = cost.count(network(call), (4, 4, 2))
    assert [layer.name for layer in counted.layers] == ["input", "head", "unused"]
    assert counted.layers[-1] == Layer("unused", params=2 * 7 + 7)


def test_a_convolution_of_its_own_is_shown_beside_the_twins():
    found = cost.twins({"name": "lenet5", "num_classes": 10, "conv": "pcnn"}, (28, 28, 1))
    assert list(found) == ["cnn", "ann", "bnn", "student"]
    # The paper's projection is one number for each place of a filter.
    assert found["student"].total.params - found["bnn"].total.params == 25 + 25 + 1
    assert found["student"].total.xnor == found["bnn"].total.xnor
    assert " xnor (CNN: " in cost.line(found, "pcnn")


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (640, "640"), (1000, "1.00 k"), (40.37e6, "40.4 M"), (999_600, "1.00 M"),
     (3.514e9, "3.51 G"), (0.75, "750 m"), (999.7e-6, "1.00 m")],
)  # fmt: skip
def test_numbers_have_three_digits(number, text):
    assert tables.short(number) == text


def run(capsys, *arguments):
    status = command_line.main(["cost", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_prints_each_layer_and_the_totals(capsys):
    status, out, _ = run(capsys, RESNET18, "--config.data.data_dir=/nowhere")
    assert status == 0
    assert "one image of 224x224x3" in out
    rows = [line.split() for line in out.splitlines()]
    assert sum(row[:1] == ["stage4_block2/conv2"] for row in rows) == 3
    totals = {row[0]: " ".join(row[1:8]) for row in rows if row and row[0] in ("CNN", "ANN", "BNN")}
    assert totals["CNN"].startswith("1.81 G 1.81 G 0 ")
    assert totals["ANN"].startswith("119 M 3.51 G 0 ")
    assert totals["BNN"].startswith("119 M 1.81 G 1.70 G")
    assert "memory traffic not included" in out
    assert max(map(len, out.splitlines())) <= 120


def test_the_command_prints_json(capsys):
    status, out, _ = run(capsys, f"--config={QUICKSTART}", "--json", "--precision=int8")
    found = json.loads(out)
    assert status == 0
    assert list(found) == ["cnn", "ann", "bnn"]
    for twin, conv in cost.TWINS.items():
        model = models.build("resnet_cifar", depth=8, num_classes=10, conv=conv)
        counted = cost.count(model, (8, 8, 1))
        assert found[twin] == cost.to_json({"": counted}, "int8")[""]
        for key in ("mul", "add", "xnor", "params"):
            assert found[twin][key] == getattr(counted.total, key)
        assert found[twin]["energy_pj"] == counted.energy_pj("int8")
        assert found[twin]["norm"] == vars(counted.total.norm)


def test_layers_alone_are_counted_on_request(capsys):
    arguments = f"--config={QUICKSTART}", "--layers_only"
    _, out, _ = run(capsys, *arguments)
    assert " norm " not in out
    found = json.loads(run(capsys, *arguments, "--json")[1])["ann"]
    assert not {"norm", "pool", "activation", "sum"} & set(found)
    assert found["energy_pj"] == pytest.approx(found["mul"] * 3.7 + found["add"] * 0.9)


MISTAKES = {
    "no config": ([], "--config is missing: python -m pkkd_jax.cost"),
    "precision": ([RESNET18, "--precision=float8"], "did you mean 'float"),
    "flag": ([RESNET18, "--jason"], "Unknown command line flag 'jason'"),
    "leaf": ([RESNET18, "--config.student.deepth=18"], "did you mean 'student.depth'"),
    "depth": ([RESNET18, "--config.student.depth=19"], "depth 19"),
    "stray word": ([RESNET18, "resnet18"], "unexpected argument 'resnet18'"),
    "images too small": ([RESNET18, "--config.data.image_size=8"], "images of shape"),
    "another flag": ([RESNET18, "--workdir=here"], "workdir"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line(mistake, capsys):
    arguments, message = MISTAKES[mistake]
    status, out, error = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_training_shows_and_keeps_what_an_image_costs(finished):
    workdir, out = finished
    found = cost.twins({"name": "resnet_cifar", "depth": 8, "num_classes": 10}, (8, 8, 1))
    assert f"cost       {cost.line(found, 'adder')}\n" in out
    assert json.loads((workdir / "cost.json").read_text()) == cost.to_json(found)
    assert (workdir / "cost.md").read_text() == cost.markdown(found)


def test_the_line_compares_with_the_ordinary_twin():
    found = cost.twins({"name": "resnet_cifar", "depth": 20, "num_classes": 10}, (32, 32, 3))
    assert cost.line(found, "adder") == (
        "an image: 443 k mul, 81.2 M add (CNN: 40.8 M mul, 40.8 M add),"
        " 76.1 uJ instead of 189 uJ in float32"
    )
    assert cost.line(found, "conv") == "an image: 40.8 M mul, 40.8 M add, 189 uJ in float32"


def test_a_network_that_cannot_be_counted_is_described_as_such(monkeypatch):
    monkeypatch.setattr(tables, "twins", lambda *_: 1 / 0)
    described = cost.described({"name": "resnet_cifar"}, (8, 8, 1))
    assert described == ({}, "not counted: ZeroDivisionError: division by zero")


def test_a_data_set_says_what_it_is_without_its_files(tmp_path):
    source = data.open_source("train", name="imagenet2012", data_dir=str(tmp_path), image_size=64)
    assert (source.num_classes, source.image_shape) == (1000, (64, 64, 3))
    with pytest.raises(UserError, match="not prepared"):
        len(source)
    with pytest.raises(UserError, match="not prepared"):
        data.build_source("train", name="imagenet2012", data_dir=str(tmp_path))
