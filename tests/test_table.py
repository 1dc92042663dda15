"""Tables: every row is a configuration, finished cells are kept, figures are right."""

import json
import math
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from experiments import report, table
from experiments.cells import Cells, collect, read
from pkkd_jax import main
from pkkd_jax.names import UserError

ROOT = Path(__file__).parent.parent
TABLES = tomllib.loads((table.HERE / "tables.toml").read_text())
SHORT = ["--config.steps=4", "--config.batch_size=16", "--config.eval.recalibrate_batches=1"]


def cell(**changes):
    figures = dict(accuracy=91.0, uncalibrated=90.0, training=89.0, teacher=93.0, top5=99.0)
    starts = [{"step": 0, "device": "1 cpu", "versions": {"jax": "0"}}]
    origin = dict(judge="test", steps=4, wall_s=60.0, starts=starts, device="1 cpu")
    return {**figures, **origin, "batch_size": 16, "epoch_s": 100.0, **changes}


@pytest.mark.parametrize("name", TABLES)
def test_every_row_is_a_configuration(name, tmp_path):
    found = table.load(name)
    cells = Cells(tmp_path, ["--config.batch_size=128"], 6, "")
    places = set()
    for column in found["columns"]:
        for row in found["rows"].values():
            if row["published_only"]:
                continue
            config, place, _ = main.parse(cells.command(found, row, column, 2)[2:])
            assert (config.data.name, config.seed) == (column, 2)
            assert config.epochs == row["set"].get("epochs", 6)
            places.add(place)
    runs = [row for row in found["rows"].values() if not row["published_only"]]
    assert len(places) == len(runs) * len(found["columns"])


def test_every_published_figure_has_a_row_and_a_source():
    figures = tomllib.loads((report.HERE / "published.toml").read_text())
    sources = figures.pop("sources")
    for name, rows in figures.items():
        known = table.load(name)["rows"]
        for row, columns in rows.items():
            assert row in known
            assert all(source in sources for each in columns.values() for _, source, *_ in each)


def test_a_row_that_is_only_published_has_no_cell_of_its_configuration():
    found = table.load("response1")
    cells = Cells(ROOT / "experiments" / "results", ["--config.batch_size=128"], 30, "")
    collected = collect(found, cells, 1)
    assert len(collected["PKKD", "cifar10"]) == 1
    added = {name: row["kd"] for name, row in found["rows"].items()}
    assert (added["PKKD"], added["ANN"], added["unnamed baseline [25]"]) == ("yes", "no", "")
    assert not collected["unnamed baseline [25]", "cifar10"]


def test_a_row_with_a_teacher_takes_it_from_that_rows_run(tmp_path):
    found, cells = table.load("response5"), Cells(tmp_path, [], 0, "")
    config, _, _ = main.parse(
        cells.command(found, found["rows"]["kernel, fixed"], "cifar10", 1)[2:]
    )
    teacher = found["rows"]["CNN, the fixed teacher"]
    assert config.teacher.run_dir == str(cells.directory(found, teacher, "cifar10", 1))
    assert (config.teacher.mode, config.teacher.which) == ("fixed", "student")


def test_every_cell_has_a_name_of_its_own_that_a_file_system_takes(tmp_path):
    cells = Cells(tmp_path, ["--config.batch_size=128"], 6, "")
    for name in tomllib.loads((report.HERE / "tables.toml").read_text()):
        found = table.load(name)
        rows = [row for row in found["rows"].values() if not row["published_only"]]
        places = [cells.directory(found, row, "cifar10", 0).parent.name for row in rows]
        assert len(set(places)) == len(places)
        assert max(map(len, places)) <= 255


def test_a_finished_table_runs_nothing_again(tmp_path, monkeypatch, capsys):
    arguments = ["quick", "--rows=ANN;KD", f"--out={tmp_path}", *SHORT]
    assert table.main(arguments) == 0
    text = next(tmp_path.glob("quick*.md")).read_text()
    assert text in capsys.readouterr().out
    plots = list(tmp_path.glob("quick*.png"))
    assert len(plots) == 2
    assert min(plot.stat().st_size for plot in plots) > 10_000
    results = json.loads(next(tmp_path.glob("*/*distill-kd*/seed0/results.json")).read_text())
    assert f"| KD | yes | {100 * results['test/student/accuracy']:.2f} |" in text
    monkeypatch.setattr(table, "run", lambda command: pytest.fail("ran again"))
    assert table.main(arguments) == 0
    # Another default since, and the cells are not what the table means now.
    place = next(tmp_path.glob("*/*distill-kd*/seed0/config.json"))
    place.write_text(place.read_text().replace('"temperature": 1.0', '"temperature": 2.0'))
    assert table.main(arguments) == 2
    assert "temperature: 2.0 there, 1.0 here" in capsys.readouterr().err


def test_a_failing_cell_does_not_keep_the_others_from_running(tmp_path, capfd, monkeypatch):
    rows = {"bad": {"set": {"optim.learning_rate": -1.0}}, "good": {"argument": "distill=kd"}}
    rows = [{"name": name, **row} for name, row in rows.items()]
    text = {"title": "two", "columns": ["digits"], "config": "quickstart", "rows": rows}
    monkeypatch.setattr(table.tomllib, "loads", lambda _: {"two": text, "sources": {}})
    report._published.cache_clear()
    assert table.main(["two", f"--out={tmp_path}", *SHORT]) == 2
    report._published.cache_clear()
    error = capfd.readouterr().err
    assert "learning_rate=-1.0" in error
    assert "failed: bad, digits, seed 0" in error
    assert "| good | yes |" in next(tmp_path.glob("two*.md")).read_text()


def test_a_signal_stops_a_table_when_its_cell_has_saved(tmp_path):
    command = [sys.executable, "-m", "experiments.table", "quick", "--rows=KD", f"--out={tmp_path}"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 20/"):
                process.terminate()
                break
        process.stdout.read()
    assert process.wait() == 128 + signal.SIGTERM
    place = next(tmp_path.glob("*/*distill-kd*/seed0/checkpoints"))
    steps = sorted(int(path.name) for path in place.iterdir())
    assert steps[-1] >= 20


def test_a_signal_before_the_training_obeys_it_stops_the_table_too(tmp_path, monkeypatch, capsys):
    started = []

    def killed(command):
        started.append(command)
        return -signal.SIGTERM

    monkeypatch.setattr(table, "run", killed)
    assert table.main(["quick", f"--out={tmp_path}"]) == 128 + signal.SIGTERM
    assert "the same command goes on" in capsys.readouterr().err
    assert len(started) == 1


def test_means_and_deviations_stand_beside_what_was_published():
    found = table.load("main1")
    cells = {(row, column): [] for row in found["rows"] for column in found["columns"]}
    cells["ResNet-20, PKKD", "cifar10"] = [cell(accuracy=91.0), cell(accuracy=92.0)]
    lines = report.markdown(found, cells, "command").splitlines()
    row = next(line for line in lines if line.startswith("| ResNet-20, PKKD"))
    assert row == (
        "| ResNet-20, PKKD |  | 91.50 ± 0.71 | 90.00 ± 0.00 | 89.00 ± 0.00 | 93.00 ± 0.00"
        " | 92.96 [3] | 2 | 100 ± 0 |"
    )


def test_a_cell_that_went_on_elsewhere_has_no_speed(tmp_path):
    stored = table.HERE / "results" / "cifar10-batch-size-128-epochs-6" / "resnet20" / "seed0"
    shutil.copytree(stored, tmp_path, dirs_exist_ok=True)
    assert read(tmp_path)["epoch_s"] > 0
    path = tmp_path / "results.json"
    found = json.loads(path.read_text())
    found["starts"].append({**found["starts"][0], "step": 900, "device": "1 gpu"})
    path.write_text(json.dumps(found))
    assert math.isnan(read(tmp_path)["epoch_s"])


def test_a_table_says_where_its_runs_were_made():
    found = table.load("main2")
    cells = {(row, "imagenet2012"): [] for row in found["rows"]}
    gpu = {"step": 1200, "device": "1 gpu", "versions": {"jax": "0", "flax": "1"}}
    cpu = cell()["starts"]
    cells["ResNet-18, PKKD", "imagenet2012"] = [cell(), cell(), cell(starts=[*cpu, gpu])]
    cells["ResNet-18, ANN", "imagenet2012"] = [cell(starts=[{**gpu, "step": 0}]), cell()]
    lines = report.markdown(found, cells, "command").splitlines()
    head = lines.index("| runs | device | jax | flax |")
    assert lines[head + 2 : head + 5] == [
        "| 3; 1 to step 1,200 | 1 cpu | 0 |  |",
        "| 1; 1 from step 1,200 | 1 gpu | 0 | 1 |",
        "",
    ]
    assert "- 5 runs of 4 steps of 16 images, 0.08 h" in lines


def test_no_mean_speed_of_different_devices_is_shown():
    found = table.load("main1")
    cells = {(row, column): [] for row in found["rows"] for column in found["columns"]}
    cells["ResNet-20, PKKD", "cifar10"] = [cell(), cell(device="1 gpu", epoch_s=9.0)]
    lines = report.markdown(found, cells, "command").splitlines()
    row = next(line for line in lines if line.startswith("| ResNet-20, PKKD"))
    assert row.endswith(" | 2 |  |")


def test_top5_stands_behind_accuracy_where_it_is_published():
    found = table.load("main2")
    cells = {(row, "imagenet2012"): [] for row in found["rows"]}
    cells["ResNet-18, PKKD", "imagenet2012"] = [cell(accuracy=60.0, top5=80.0)]
    text = report.markdown(found, cells, "command")
    assert "**imagenet2012**, top-5 in brackets" in text
    assert (
        "| ResNet-18, PKKD |  | 60.00 (80.00) | 90.00 | 89.00 | 93.00 | 68.80 (88.60) [1] |" in text
    )


def test_sources_that_differ_both_stand(monkeypatch):
    both = [(92.0, "adder_readme"), (93.0, "addernet")]
    monkeypatch.setattr(report, "published", lambda *_: both)
    found = table.load("methods")
    cells = {(row, "cifar10"): [cell()] for row in found["rows"]}
    text = report.markdown(found, cells, "command")
    assert "92.00 [1], 93.00 [2]" in text
    assert "- [1] README of the AdderNet" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quik"], "did you mean 'quick'"),
        (["quick", "--rows=ANNN"], "did you mean 'ANN'"),
        (["quick", "--seeds=0"], "--seeds=0"),
        (["quick", "--sed=1"], "--sed=1"),
        (["quick", "--config.seed=5"], "--seeds=N"),
        (["quick", "--config.epoch=3"], "'epoch': did you mean 'epochs'"),
    ],
)
def test_a_mistake_is_one_clear_line(arguments, message, capsys):
    assert table.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_unknown_table_is_named():
    with pytest.raises(UserError, match="unknown table 'response9'"):
        table.load("response9")
