"""RESULTS.md: what finished cells say of the claims, and no more than they say."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest

from experiments import results, table
from experiments.cells import training_accuracy
from pkkd_jax import analysis

KNOWN = tomllib.loads((results.HERE / "claims.toml").read_text())


def test_every_claim_is_about_rows_of_a_block():
    assert {claim["table"] for claim in KNOWN["claims"]} == {b["table"] for b in KNOWN["blocks"]}
    for block in KNOWN["blocks"]:
        rows = block.get("rows", table.load(block["table"])["rows"])
        assert set(rows) <= set(table.load(block["table"])["rows"])
        for claim in KNOWN["claims"]:
            if claim["table"] == block["table"]:
                assert {claim["better"], *claim.get("worse", [])} <= set(rows)


@pytest.mark.parametrize(
    ("better", "worse", "verdict"),
    [
        # t = 1 / 0.1414 with 2 degrees of freedom
        ([91.0, 91.2], [90.0, 90.2], "+1.00: holds, p = 0.019"),
        ([90.0, 90.2], [91.0, 91.2], "-1.00: does not hold, p = 0.019"),
        ([90.0, 91.0], [90.0, 90.2], "+0.40: not decided, p = 0.57"),
        ([91.0], [90.0], "+1.00"),
        ([90.0], [91.0, 91.2], "-1.10"),
        ([91.0, 91.0], [91.0, 91.0], "+0.00: not decided"),
        ([], [91.0], "not run"),
    ],
)
def test_a_difference_is_decided_by_a_test(better, worse, verdict):
    assert results.compare(better, worse) == verdict


def cell(**changes):
    looked = {"student": {"laplace": 3, "gauss": 1}, "teacher": {"laplace": 3, "gauss": 1}}
    features = {"filters": looked, "similarity": 0.9}
    figures = {"accuracy": 90.0, "epoch_s": 3.0, "device": "1 cpu"}
    return {**figures, "features": features, **changes}


def test_each_quantity_has_its_own_comparison():
    cells = {"a": [cell()], "b": [cell(epoch_s=2.0)], "none": []}
    cells["c"] = [cell(features=None, device="1 gpu")]
    cells["moved"] = [cell(epoch_s=float("nan"))]
    time = {"quantity": "time", "better": "a", "worse": ["b"], "bound": 1.2}
    assert results.check(time, cells) == [("a / b", "1.50 times: does not hold")]
    assert results.check({**time, "bound": 1.6}, cells)[0][1] == "1.50 times: holds"
    verdicts = [line[1] for line in results.check({**time, "worse": ["c", "moved", "none"]}, cells)]
    assert verdicts == ["made on different devices"] * 2 + ["not run"]
    cells["both"] = [cell(epoch_s=2.0), cell(epoch_s=9.0, device="1 gpu"), *cells["moved"]]
    assert results.check({**time, "worse": ["both"]}, cells)[0][1] == "1.50 times: does not hold"
    assert results.check({"quantity": "filters", "better": "a"}, cells) == [
        ("student's layers", "3 laplace, 1 gauss: holds"),
        ("teacher's layers", "3 laplace, 1 gauss: does not hold"),
    ]
    assert results.check({"quantity": "filters", "better": "c"}, cells)[0][1] == "no checkpoint"
    assert results.check({"quantity": "filters", "better": "none"}, cells)[0][1] == "not run"
    less = {**cell()["features"], "similarity": 0.8}
    cells["b"] = [cell(features=less)]
    alike = {"quantity": "similarity", "better": "a", "worse": ["b", "c", "none"]}
    verdicts = [line[1] for line in results.check(alike, cells)]
    assert verdicts == ["0.900 and 0.800", "no checkpoint", "not run"]


def test_results_say_what_is_there_and_what_is_not(tmp_path, monkeypatch, capsys):
    out = tmp_path / "cells"
    stored = results.HERE / "results"
    names = ("resnet20", "resnet20-distill.pkkd.kernel-False")
    for name in names:
        place = Path("cifar10-batch-size-128-epochs-10", name, "seed0")
        (out / place).mkdir(parents=True)
        for file in stored.joinpath(place).iterdir():
            if file.suffix in (".json", ".jsonl"):
                shutil.copy(file, out / place)
    monkeypatch.chdir(tmp_path)
    assert results.main(["--out=cell"]) == 2
    assert capsys.readouterr().err == (
        "error: --out='cell' is no directory: name that of a table's cells\n"
    )
    (tmp_path / "empty").mkdir()
    assert results.main(["--out=empty"]) == 2
    assert "holds no finished cell" in capsys.readouterr().err
    assert not (tmp_path / "RESULTS.md").exists()
    assert results.main(["--out=cells"]) == 0
    text = (tmp_path / "RESULTS.md").read_text()
    assert text in capsys.readouterr().out
    accuracies = [
        json.loads(
            (out / f"cifar10-batch-size-128-epochs-10/{name}/seed0/results.json").read_text()
        )
        for name in names
    ]
    with_kernel, without = (100 * found["test/student/accuracy"] for found in accuracies)
    assert "| claim |  | 6 epochs | 10 epochs | 30 epochs |" in text
    claim = "The kernel helps (K > NK) | kernel, progressive > no kernel, progressive"
    assert f"| {claim} |  | {with_kernel - without:+.2f} | not run |" in text
    several = "where they have one | PKKD > ANN with dropout | not run |  | not run |\n"
    assert f"{several}|  | PKKD > snapshot distillation | not run |" in text
    assert f"| kernel, progressive | yes | {with_kernel:.2f} |" in text
    assert "| kernel, fixed | yes | not run |" in text
    assert (out / "results-response5-10-epochs-curves.png").stat().st_size > 10_000
    assert "(cells/results-response5-10-epochs-curves.png)" in text


def test_features_are_looked_at_once_and_kept(kernel_run, alone_run, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(kernel_run, run_dir)
    found = results.features(run_dir)
    layers = analysis.filters(analysis.load(run_dir).networks["student"])
    for counts in found["filters"].values():
        assert sum(counts.values()) == len(layers) - 1  # the stem is not counted
    assert 0 < found["similarity"] < 1
    shutil.rmtree(run_dir / "checkpoints")
    assert results.features(run_dir) == found
    (run_dir / "features.json").unlink()
    assert results.features(run_dir) is None
    shutil.copytree(alone_run, tmp_path / "alone")
    assert list(results.features(tmp_path / "alone")["filters"]) == ["student"]


def test_training_accuracy_is_the_mean_before_each_evaluation():
    leaf = "train/student/accuracy"
    rows = [{"step": step, leaf: a} for step, a in [(1, 0.1), (4, 0.2), (6, 0.4), (7, 0.7)]]
    rows += [{"step": 10, leaf: 0.9}]
    assert training_accuracy(rows, [7, 10]) == pytest.approx([(3 * 0.2 + 2 * 0.4 + 0.7) / 6, 0.9])
