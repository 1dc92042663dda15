"""The loop through the command line: results, resuming, and every mistake a user can make."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from trainings import MINE, QUICKSTART, ROOT, SHORT, command, final, photographs

from pkkd_jax import (
    checkpoint,
    data,
    evaluate,
    experiment,
    main,
    metrics,
    provenance,
    train,
    workdirs,
)
from pkkd_jax.names import UserError
from pkkd_jax.ops import cpu


def test_a_run_says_what_it_does_and_what_came_of_it(finished):
    workdir, out = finished
    for text in (f"adder op: {cpu.selected()}", "digits, 1,437 train and 360 test images",
                 "conv='adder'", "parameters, progressive", "1 CE + 1 kd + 1 pkkd",
                 "12 of 16 images", ", new", "step 12/12", "img/s", "uncalibrated accuracy",
                 str(workdir)):  # fmt: skip
        assert text in out


def test_a_wider_teacher_and_one_that_teaches_nothing_are_said(tmp_path):
    line = command(tmp_path, "--config.teacher.width_multiplier=1.5")
    line[1] += ":distill=none"
    built = experiment.build(main.parse(line)[0])
    summary = experiment.describe(built, 0, tmp_path, "")
    assert "resnet_cifar 8 of 1.5 times the width" in summary["teacher"]
    assert summary["losses"].startswith("1 CE, nothing from the teacher")


def test_the_run_directory_is_complete(finished):
    workdir, _ = finished
    names = {p.name for p in workdir.iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "results.json", "curves.png", "checkpoints",
                     "tensorboard"}  # fmt: skip
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((workdir / "results.json").read_text())
    for network in ("student", "teacher"):
        for what in ("accuracy", "top5", "loss"):
            assert f"test/{network}/{what}" in results
            assert f"test/{network}/{what}_uncalibrated" in results
    assert results["steps"] == 12
    assert results["wall_s"] > 0
    (start,) = results["starts"]
    assert start["step"] == 0
    assert start["versions"] == provenance.origin()["versions"]
    assert f"adder op: {cpu.selected()}" in start["device"]
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert any("train/student/loss_mid" in row for row in rows)
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)


def test_evaluating_a_run_afresh_gives_its_results(finished):
    workdir, _ = finished
    figures = evaluate.evaluate(str(workdir))
    wanted = final(workdir)[2]
    assert figures.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_allclose(figures[key], value, atol=1e-4, rtol=1e-4)


def test_training_images_are_evaluated_on_request(finished, capsys):
    workdir, _ = finished
    assert evaluate.main([str(workdir), "--split=train"]) == 0
    figures = json.loads(capsys.readouterr().out)
    share = figures["train/student/accuracy"] * 1437
    assert share == pytest.approx(round(share), abs=1e-3)
    assert not any(key.startswith("test/") for key in figures)


def test_a_finished_run_is_not_trained_again(finished, capsys):
    workdir, _ = finished
    before = (workdir / "metrics.jsonl").read_text()
    assert main.main(command(workdir)) == 0
    assert "resumed at step 12" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_text() == before


def test_a_finished_run_without_its_checkpoints_keeps_its_figures(finished, tmp_path, capsys):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints")
    before = {name: (workdir / name).read_text() for name in ("metrics.jsonl", "results.json")}
    assert main.main(command(workdir)) == 0
    assert "Test results after 12 steps" in capsys.readouterr().out
    assert {name: (workdir / name).read_text() for name in before} == before


def test_two_trainings_in_one_directory_are_refused(tmp_path, capsys):
    config, workdir, _ = main.parse(command(tmp_path / "run"))

    def start_another(figures):
        if figures["step"] == 3:
            assert main.main(command(workdir)) == 2
            assert "a training is running there" in capsys.readouterr().err

    results = train.train_and_evaluate(config, workdir, at_interval=start_another)
    assert results["steps"] == 12
    assert metrics.read(workdir)[-1]["step"] == 12


def test_other_images_or_another_teacher_are_not_taken_for_the_same_run(finished, tmp_path, capsys):
    photographs(tmp_path / "dark", 20)
    photographs(tmp_path / "light", 200)

    def of(place):
        line = command(tmp_path / "folder", f"--config.data.data_dir={tmp_path / place}",
                       "--config.data.image_size=8", "--config.data.augmentation=crop_flip",
                       "--config.teacher.mode=none")  # fmt: skip
        line[1] += ":data=folder"
        return line

    assert main.main(of("dark")) == 0
    (tmp_path / "dark").rename(tmp_path / "moved")
    assert main.main(of("moved")) == 0
    assert main.main(of("light")) == 2
    assert "images whose pixels have a mean of" in capsys.readouterr().err

    def beside(teacher):
        more = ["--config.teacher.mode=fixed", f"--config.teacher.run_dir={teacher}"]
        return command(tmp_path / "run", *more)

    shutil.copytree(finished[0], tmp_path / "teacher")
    assert main.main(command(tmp_path / "other", "--config.seed=1")) == 0
    assert main.main(beside(finished[0])) == 0
    assert main.main(beside(tmp_path / "teacher")) == 0
    assert main.main(beside(tmp_path / "other")) == 2
    assert "beside another teacher than that of" in capsys.readouterr().err


def test_a_mistake_that_shows_late_can_be_mended_in_the_same_directory(tmp_path, capsys):
    workdir = tmp_path / "run"
    assert main.main(command(workdir, "--config.distill.pkkd.taps=stage9")) == 2
    assert "'stage9'" in capsys.readouterr().err
    config, _, _ = main.parse(command(workdir))
    workdirs.require_same_run(workdir, experiment.build(config).config)


def test_leaves_that_change_no_result_may_differ_in_a_resumed_run(finished):
    more = ["--config.log_every_steps=7", "--config.checkpoint_every_s=9", "--config.workers=1"]
    config, workdir, _ = main.parse(command(finished[0], *more))
    workdirs.require_same_run(workdir, experiment.build(config).config)


def test_a_network_is_loaded_from_a_run(finished):
    workdir, _ = finished
    for which in ("student", "teacher"):
        for step in ("last", "best", 12):
            model, variables = checkpoint.load_network(workdir, which, step)
            outputs = model.apply(variables, np.zeros((2, 8, 8, 1), np.float32), train=False)
            assert outputs.logits.shape == (2, 10)
    with pytest.raises(UserError, match=r"step=5.*\[.*12\]"):
        checkpoint.load_network(workdir, step=5)


def test_a_calibrated_network_has_the_figures_of_the_results(finished):
    workdir, _ = finished
    test = data.build_source("test", name="digits")
    images = data.normalise(test.images, test.mean, test.std)
    for which in ("student", "teacher"):
        model, variables = evaluate.calibrated(workdir, which)
        best = model.apply(variables, images, train=False).logits.argmax(-1)
        wanted = final(workdir)[2][f"test/{which}/accuracy"]
        assert (best == test.labels).mean() == pytest.approx(wanted, abs=0.01)


def test_a_network_that_is_not_the_checkpoints_is_one_clear_line(finished, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace('"depth": 8', '"depth": 14'))
    assert evaluate.main([str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "stage1_block2" in error
    assert error.count("\n") == 1


def test_a_fixed_teacher_is_used_as_it_was_trained(finished, tmp_path):
    workdir = tmp_path / "run"
    fixed = [
        "--config.teacher.mode=fixed",
        f"--config.teacher.run_dir={finished[0]}",
        "--config.eval.recalibrate_batches=0",
    ]
    assert main.main(command(workdir, *fixed)) == 0
    ours, theirs = (final(d)[1]["teacher"] for d in (workdir, finished[0]))
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key])


def test_a_network_trains_without_a_teacher(tmp_path, capsys):
    assert main.main(command(tmp_path / "run", "--config.teacher.mode=none")) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "test/student/accuracy" in results
    assert "test/teacher/accuracy" not in results
    assert "teacher    none" in capsys.readouterr().out


def test_held_out_images_judge_in_the_place_of_the_test_images(tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert main.main(command(run_dir, "--config.data.validation=100")) == 0
    results = json.loads((run_dir / "results.json").read_text())
    assert "validation/student/accuracy" in results
    assert not any(key.startswith("test/") for key in results)
    assert "100 validation images" in (shown := capsys.readouterr().out)
    assert "Validation results after 12 steps" in shown
    figures = evaluate.evaluate(run_dir, split="validation")
    assert figures["validation/student/accuracy"] == results["validation/student/accuracy"]
    assert "test/student/accuracy" in evaluate.evaluate(run_dir)


def test_a_snapshot_run_keeps_two_networks_of_one_kind(tmp_path, capsys):
    snapshot = ["--config.teacher.mode=snapshot", "--config.optim.cycles=3",
                "--config.eval.every_epochs=0.05", "--config.checkpoint_every_s=1000"]  # fmt: skip
    arguments = command(tmp_path / "run", *snapshot)
    arguments[1] += ":distill=kd"
    assert main.main(arguments) == 0
    assert "the student at the end of the cycle before, 3 cycles" in capsys.readouterr().out
    last, parts, _ = final(tmp_path / "run")  # of 12 steps, saved after 4, 8 and 12
    checkpoints = checkpoint.Checkpoints(tmp_path / "run")
    before = checkpoints.read(last - 4)["student"]
    checkpoints.close()
    for key, value in parts["teacher"].items():
        np.testing.assert_array_equal(before[key], value)
    kernel = "params/stem/kernel"
    assert (parts["student"][kernel] != parts["teacher"][kernel]).any()


def test_taps_that_do_not_fit_leave_no_run_behind(tmp_path, capsys):
    arguments = command(tmp_path / "run", "--config.distill.attention_transfer.taps=penultimate")
    arguments[1] += ":distill=attention_transfer"
    assert main.main(arguments) == 2
    assert "penultimate is" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_users_own_loss_network_and_data_are_named_by_dotted_paths(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    config = f"--config={QUICKSTART}:distill=mine.logits,student=mine.Net,data=mine.data"
    more = ["--config.distill.mine.logits.scale=0.5", "--config.student.width=6"]
    line = command(tmp_path / "run", *more)
    assert main.main([line[0], config, *line[2:]]) == 0
    rows = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "train/student/loss_logits" in rows
    _, parts, _ = final(tmp_path / "run")
    assert parts["student"]["params/Conv_0/kernel"].shape == (3, 3, 1, 6)
    with pytest.raises(UserError, match="outside"):
        checkpoint.load_network(tmp_path / "run")
    assert evaluate.main([str(tmp_path / "run")]) == 2
    assert "--trust" in capsys.readouterr().err
    assert evaluate.main([str(tmp_path / "run"), "--trust"]) == 0
    fixed = ["--config.teacher.mode=fixed", f"--config.teacher.run_dir={tmp_path / 'run'}",
             "--config.teacher.which=student", "--config.teacher.conv=adder",
             "--config.teacher.width=6"]  # fmt: skip
    config = f"--config={QUICKSTART}:distill=kd,student=mine.Net,teacher=mine.Net,data=mine.data"
    assert main.main([line[0], config, f"--workdir={tmp_path / 'second'}", *SHORT, *fixed]) == 0


MISTAKES = {
    "config file": ([f"--config={ROOT}/configs/quickstrat.py"], "did you mean"),
    "leaf": (["--config.batchsize=8"], "'batchsize': did you mean 'batch_size'"),
    "type of a leaf": (["--config.batch_size=many"], "many"),
    "argument": ([f"--config={QUICKSTART}:date=digits"], "'date=digits'"),
    "data set in the argument": ([f"--config={QUICKSTART}:data=digit"], "did you mean 'digits'"),
    "model": (["--config.student.name=resnet_cifra"], "did you mean 'resnet_cifar'"),
    "convolution": (["--config.student.conv=addr"], "did you mean 'adder'"),
    "convolution that is none": (["--config.student.conv=math.sin"], "'math.sin' is not called as"),
    "data set": (["--config.data.name=digit"], "did you mean 'digits'"),
    "loss": ([f"--config={QUICKSTART}:distill=pkdd"], "did you mean 'pkkd'"),
    "optimiser": (["--config.optim.name=sdg"], "did you mean 'sgd'"),
    "optimiser in the argument": ([f"--config={QUICKSTART}:optim=adamm"], "did you mean 'adam'"),
    "dropout": (["--config.student.dropout=1.0"], "dropout=1.0"),
    "label smoothing": (["--config.label_smoothing=1.5"], "config.label_smoothing=1.5"),
    "no steps": (["--config.steps=0", "--config.epochs=0"], "config.epochs=0"),
    "batch of zero": (["--config.batch_size=0"], "config.batch_size=0"),
    "negative batch": (["--config.batch_size=-8"], "config.batch_size=-8"),
    "batch and devices": (["--config.batch_size=18"], "4 devices"),
    "depth": (["--config.student.depth=9"], "depth 9"),
    "seed": (["--config.seed=-1"], "config.seed=-1"),
    "seed of too many bits": (["--config.seed=4294967296"], "config.seed=4294967296"),
    "number that is not finite": (["--config.eval.every_epochs=inf"], "every_epochs=inf: it must"),
    "augmentation": (["--config.data.augmentation=cropflip"], "did you mean 'crop_flip'"),
    "optimiser that wants more": ([f"--config={QUICKSTART}:optim=lbfgs"], "'lbfgs'"),
    "config file without its folder": (["--config=quickstart.py"], "configs/quickstart.py"),
    "module of the user's own": ([f"--config={QUICKSTART}:distill=broken.loss"], "broken.py:1"),
    "tap that is no response": (["--config.distill.pkkd.taps=penultimate"], "penultimate is"),
    "image shape": (["--config.student.name=resnet_imagenet", "--config.student.depth=18"], "8, 8"),
    "dtype": (["--config.dtype=float16"], "'float16'"),
    "teacher mode": (["--config.teacher.mode=progresive"], "did you mean 'progressive'"),
    "network of the teacher's run": (["--config.teacher.which=studnet"], "did you mean 'student'"),
    "teacher's directory without use": (["--config.teacher.run_dir=runs/cnn"], "mode to 'fixed'"),
    "negative weight of the labels": (["--config.alpha=-1.0"], "config.alpha=-1.0"),
    "negative weight of a loss": (["--config.distill.kd.weight=-1.0"], "weight=-1.0 of a loss"),
    "a loss twice": ([f"--config={QUICKSTART}:distill=kd+kd"], "distill=kd+kd: a loss is named"),
    "warm-up as long as the run": (["--config.optim.warmup_steps=12"], "below the 12 steps"),
    "batch above all images": (
        ["--config.steps=0", "--config.epochs=1", "--config.batch_size=4000"],
        "config.batch_size=4000: config.epochs=1 times 1437 images",
    ),
    "snapshots without cycles": (["--config.teacher.mode=snapshot"], "config.optim.cycles=1"),
    "weight schedule": (["--config.distill.kd.weight_schedule=cosin"], "did you mean 'cosine'"),
    "too many images held out": (["--config.data.validation=1437"], "validation=1437"),
    "networks that do not pair": (
        ["--config.teacher.depth=20", "--config.distill.pkkd.taps=block_ends"],
        "3 of the student",
    ),
    "teacher without directory": (["--config.teacher.mode=fixed"], "config.teacher.run_dir"),
    "teacher's directory missing": (
        ["--config.teacher.mode=fixed", "--config.teacher.run_dir=/nowhere"],
        "/nowhere",
    ),
    "tap": (["--config.distill.pkkd.taps=stage9"], "'stage9'"),
    "temperature": (["--config.distill.kd.temperature=0.0"], "temperature=0.0"),
    "part as a leaf": (["--config.distill=kd"], "swapped by --config="),
    "stray word": (["resume"], "'resume'"),
    "no processes": (["--process_count=0"], "--process_count=0: it must be 1"),
    "data that is not prepared": (
        [f"--config={QUICKSTART}:data=cifar10", "--config.data.data_dir=/nowhere"],
        "pkkd_jax.data.prepare cifar10",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line(mistake, tmp_path, capsys, monkeypatch):
    arguments, message = MISTAKES[mistake]
    (tmp_path / "broken.py").write_text("undefined")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(ROOT)
    line = command(tmp_path / "run", *arguments)
    if arguments[0].startswith("--config="):
        del line[1]
    assert main.main(line) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


FILES = {
    "config.batchsize = 8": "'batchsize': did you mean 'batch_size'",
    "config.eval.every_epoch = 5.0": "did you mean 'eval.every_epochs'",
    "config.distill = {'kd': {}}": "config.distill.kd={}: a loss has a weight",
    "config.distill = {'kd': {'temperature': 4.0}}": "config.distill.kd.temperature=4.0: a loss",
    "config = None": "get_config returned NoneType",
}


@pytest.mark.parametrize("line", FILES)
def test_a_mistake_in_a_config_file_is_one_clear_line(line, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        "from pkkd_jax import config as lib\n"
        "def get_config(arg=None):\n"
        "    config = lib.base()\n"
        "    config.data = {'name': 'digits'}\n"
        f"    {line}\n"
        "    return config and lib.with_argument(config, arg)\n"
    )
    assert main.main(["main", f"--config={file}", f"--workdir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert FILES[line] in error
    assert error.count("\n") == 1


def test_the_config_file_may_be_a_word_of_its_own():
    line = command("run")
    words = [line[0], *line[1].split("="), *line[2:]]
    assert main.parse(words)[0] == main.parse(line)[0]


def test_help_shows_flags_and_the_leaves_of_a_config_file(capsys):
    for line, shown in ((["--help"], "--workdir"), (["--help", "--config", QUICKSTART],
                        "--config.distill.pkkd.taps='auto'")):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            main.main(["main", *line])
        assert not end.value.code
        assert shown in capsys.readouterr().out


def test_no_config_is_one_clear_line(capsys):
    assert main.main(["main"]) == 2
    assert "--config is missing" in capsys.readouterr().err


def test_a_teacher_of_another_architecture_is_refused(finished, tmp_path, capsys):
    more = [
        "--config.teacher.mode=fixed",
        f"--config.teacher.run_dir={finished[0]}",
        "--config.teacher.depth=14",
    ]
    assert main.main(command(tmp_path / "run", *more)) == 2
    assert "config.teacher.depth: 8 there, 14 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("--config.seed=7", "config.seed: 0 there, 7 here"),
        ("--config.dtype=bfloat16", "config.dtype: 'float32' there, 'bfloat16' here"),
        ("--config.teacher.mode=none", "config.teacher.mode: 'progressive' there, 'none' here"),
    ],
)
def test_a_directory_with_another_config_is_refused(finished, capsys, changed, message):
    assert main.main(command(finished[0], changed)) == 2
    assert message in capsys.readouterr().err


def test_a_directory_with_other_files_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    assert main.main(command(tmp_path)) == 2
    assert "holds other files" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_directory_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main.main(command(tmp_path / "file" / "run")) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_evaluating_on_images_of_another_shape_is_one_clear_line(finished, tmp_path, capsys):
    for split in ("train", "test"):
        for label in range(10):
            folder = tmp_path / split / str(label)
            folder.mkdir(parents=True)
            Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "0.png")
    more = ["--data=folder", f"--data_dir={tmp_path}"]
    assert evaluate.main([str(finished[0]), *more]) == 2
    error = capsys.readouterr().err
    assert "images of 224x224x3" in error
    assert error.count("\n") == 1


def test_a_damaged_config_is_one_clear_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    assert main.main(command(tmp_path)) == 2
    assert "cannot be used (Expecting property" in capsys.readouterr().err


def test_evaluating_what_is_no_run_is_one_clear_line(tmp_path, capsys):
    assert evaluate.main([str(tmp_path)]) == 2
    assert "no config.json" in capsys.readouterr().err
