"""What README shows works as it stands there, and its figures are those of RESULTS.md."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pkkd_jax import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_loss_of_ones_own_trains(tmp_path, monkeypatch):
    section = README.partition("**A loss**")[2]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    command = re.search(r"python -m pkkd_jax.main (--config=.*\n.*)\n", section).group(1)
    words = command.replace("\\\n", " ").split()
    (tmp_path / "my_loss.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(ROOT)
    run_dir = tmp_path / "run"
    short = [f"--workdir={run_dir}", "--config.steps=2", "--config.batch_size=16"]
    words = [word for word in words if not word.startswith("--workdir")]
    assert main.main(["main", *words, *short]) == 0
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["train/student/loss_logits"] > 0


@pytest.mark.parametrize(
    "first_line",
    [
        "from pkkd_jax import data, evaluate",
        "from pkkd_jax import analysis",
        "from pathlib import Path",
    ],
)
def test_what_notebooks_are_told_to_do_works(first_line, kernel_run, tmp_path, monkeypatch):
    (code,) = re.findall(rf"```python\n({re.escape(first_line)}\n.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(kernel_run, tmp_path / "runs" / "quickstart")
    exec(code, {})


def test_the_layer_trains_in_a_network_of_ones_own():
    (code,) = re.findall(r"```python\n(import optax\n.*?)```", README, re.DOTALL)
    names = {"__name__": __name__}
    exec(code, names)
    network, optimiser = names["Net"](), names["optimiser"]
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    variables = network.init(jax.random.key(0), images, True)

    def loss(params):
        logits, _ = network.apply(
            {**variables, "params": params}, images, True, mutable=["batch_stats"]
        )
        return jnp.square(logits - 1).mean()

    gradients = jax.grad(loss)(variables["params"])
    updates, _ = optimiser.update(gradients, optimiser.init(variables["params"]))
    filters = updates["AdderConv_0"]["filters"]
    # 0.2 sqrt(size) times the learning rate of 0.1
    np.testing.assert_allclose(jnp.linalg.norm(filters), 0.02 * filters.size**0.5, rtol=1e-5)


def test_figures_are_those_of_results():
    table = README.partition("| adder ResNet-20 |")[2].partition("\n\n")[0]
    figures = re.findall(r"([\d.]+)%", table)
    assert len(figures) == 28
    known = (ROOT / "experiments" / "RESULTS.md").read_text()
    assert [f for f in figures if not re.search(rf"\| {re.escape(f)} (±|\|)", known)] == []
