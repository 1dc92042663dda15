"""Tables: every row is a configuration, finished cells are kept, figures are right."""

import json
import tomllib

import pytest

from experiments import report, table
from pkkd_jax import main
from pkkd_jax.names import UserError

TABLES = tomllib.loads((table.HERE / "tables.toml").read_text())
SHORT = ["--config.steps=4", "--config.batch_size=16", "--config.eval.recalibrate_batches=1"]


def cell(**changes):
    figures = dict(accuracy=91.0, uncalibrated=90.0, teacher=93.0, kd=True, images_per_s=100.0)
    origin = dict(judge="test", steps=4, wall_s=60.0, versions={"jax": "0"}, device="1 cpu")
    return {**figures, **origin, "batch_size": 16, **changes}


@pytest.mark.parametrize("name", TABLES)
def test_every_row_is_a_configuration(name, tmp_path):
    found = table.load(name)
    cells = table.Cells(tmp_path, ["--config.batch_size=128"], 6, "")
    places = set()
    for column in found["columns"]:
        for row in found["rows"].values():
            if row["published_only"]:
                continue
            config, place = main._parse(cells.command(found, row, column, 2)[2:])
            assert (config.data.name, config.seed, config.epochs) == (column, 2, 6)
            places.add(place)
    runs = [row for row in found["rows"].values() if not row["published_only"]]
    assert len(places) == len(runs) * len(found["columns"])


def test_every_published_figure_has_a_row_and_a_source():
    figures = tomllib.loads((report.HERE / "published.toml").read_text())
    sources = figures.pop("sources")
    for name, rows in figures.items():
        for row, columns in rows.items():
            assert row in table.load(name)["rows"]
            assert all(source in sources for each in columns.values() for _, source in each)


def test_a_row_with_a_teacher_takes_it_from_that_rows_run(tmp_path):
    found, cells = table.load("response5"), table.Cells(tmp_path, [], 0, "")
    config, _ = main._parse(cells.command(found, found["rows"]["kernel, fixed"], "cifar10", 1)[2:])
    teacher = found["rows"]["CNN, the fixed teacher"]
    assert config.teacher.run_dir == str(cells.directory(found, teacher, "cifar10", 1))
    assert (config.teacher.mode, config.teacher.which) == ("fixed", "student")


def test_a_finished_table_runs_nothing_again(tmp_path, monkeypatch, capsys):
    arguments = ["quick", "--rows=ANN;KD", f"--out={tmp_path}", *SHORT]
    assert table.main(arguments) == 0
    text = (tmp_path / "quick.md").read_text()
    assert text in capsys.readouterr().out
    assert (tmp_path / "quick.png").stat().st_size > 10_000
    results = json.loads(next(tmp_path.glob("*/*distill-kd*/seed0/results.json")).read_text())
    assert f"| KD | yes | {100 * results['test/student/accuracy']:.2f} |" in text
    monkeypatch.setattr(table.subprocess, "run", lambda *a, **k: pytest.fail("ran again"))
    monkeypatch.setattr(report, "_commit", lambda: "no commit")
    assert table.main(arguments) == 0


def test_a_failing_cell_stops_the_table(tmp_path, capfd):
    assert table.main(["quick", f"--out={tmp_path}", "--config.stps=4"]) == 2
    assert "did you mean 'steps'" in capfd.readouterr().err


def test_means_and_deviations_stand_beside_what_was_published():
    found = table.load("main1")
    cells = {(row, column): [] for row in found["rows"] for column in found["columns"]}
    cells["ResNet-20, PKKD", "cifar10"] = [cell(accuracy=91.0), cell(accuracy=92.0)]
    lines = report.markdown(found, cells, "command").splitlines()
    row = next(line for line in lines if line.startswith("| ResNet-20, PKKD"))
    assert row == (
        "| ResNet-20, PKKD | yes | 91.50 ± 0.71 | 90.00 ± 0.00 | 93.00 ± 0.00 | 92.96 [2] | 2"
        " | 100 ± 0 |"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quik"], "did you mean 'quick'"),
        (["quick", "--rows=ANNN"], "did you mean 'ANN'"),
        (["quick", "--seeds=0"], "--seeds=0"),
        (["quick", "--sed=1"], "--sed=1"),
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
