"""The page about runs, as a browser would be given it."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from pkkd_jax import report


@pytest.fixture(scope="module")
def page(kernel_run, no_kernel_run, tmp_path_factory):
    """Of a finished run and of one that has not ended yet."""
    unfinished = tmp_path_factory.mktemp("unfinished") / "no_kernel"
    shutil.copytree(no_kernel_run, unfinished)
    (unfinished / "results.json").unlink()
    out = tmp_path_factory.mktemp("page") / "page.html"
    arguments = [str(kernel_run), str(unfinished), f"--out={out}", "--images=24"]
    assert report.main(arguments) == 0
    return out.read_text()


def test_the_page_holds_all_that_it_shows(page):
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) >= 10
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script" not in page
    assert "url(" not in page


def test_every_tag_is_closed(page):
    class Tags(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open = []

        def handle_starttag(self, tag, attributes):
            if tag not in ("meta", "img"):
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    tags = Tags()
    tags.feed(page)
    assert tags.open == []


def test_runs_stand_side_by_side_with_what_sets_them_apart(page, kernel_run):
    results = json.loads((kernel_run / "results.json").read_text())
    for network in ("student", "teacher"):
        assert f"<td>{100 * results[f'test/{network}/accuracy']:.2f}</td>" in page
    assert "no_kernel: not finished" in page
    assert "config.distill.pkkd.kernel: True there, False here" in page
    for heading in ("Results", "Curves", "Cost of one image", "Kernel space", "Configuration"):
        assert f"<h2>{heading}</h2>" in page


def test_a_run_without_a_teacher_has_a_page(alone_run, tmp_path):
    assert report.main([str(alone_run), "--images=12"]) == 0
    page = (alone_run / "report.html").read_text()
    assert "<td>teacher</td>" not in page
    assert "<td>student</td>" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{nowhere}"], "holds no config.json"),
        (["{run}", "{run}"], "named twice"),
        (["{run}", "--images=-1"], "count=-1"),
        (["{run}", "--images=12", "--out={nowhere}/page.html"], "make it or choose another"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, kernel_run, tmp_path, capsys):
    places = {"run": kernel_run, "nowhere": tmp_path / "nowhere"}
    assert report.main([each.format(**places) for each in arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert not shown.out
