"""Check reports by parsing their HTML."""

import base64
import subprocess
from pathlib import Path

from bs4 import BeautifulSoup
from sample_rows import FOUR, needle, suite

from lwm.evaluation.report.page import environment, revision, title_of, write_report
from lwm.evaluation.report.scores import Table

SETTINGS = {
    "evaluation": "needle", "model": "<b>bold</b>", "theta": 500000.0, "haystack": "a & b",
    "lengths": [1024, 4096], "mesh": None,
}  # fmt: skip


def page_of(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def test_a_report_is_complete_and_self_contained(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> & \"quoted\" <img src='http://example.org/x.png'>"
    rows = [*FOUR, needle(4096, 50.0, True, response=evil, question="What is it?")]
    path = write_report(tmp_path, SETTINGS, rows, keys=[*rows, *FOUR], notes=["One & only."])
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "by_length.png", "by_length.svg", "heat_map.png", "heat_map.svg", "report.html"
    ]  # fmt: skip
    page = page_of(path)
    assert not page.find_all(["script", "link", "a", "iframe", "object", "form"])
    pictures = page.find_all("img")
    assert len(pictures) == 2
    for picture, name in zip(pictures, ("heat_map", "by_length"), strict=True):
        head, data = str(picture["src"]).split(",")
        assert head == "data:image/svg+xml;base64"
        assert base64.b64decode(data) == (tmp_path / f"{name}.svg").read_bytes()
    assert page.h1 is not None
    assert page.h1.text == "needle · <b>bold</b> · theta 500,000"
    text = page.get_text(" ")
    for words in (evil, "One & only.", "7 of 13", "57.1%", "a & b", "What is it?", "[1024, 4096]"):
        assert words in text, words
    for name, version in environment().items():
        assert name in text
        assert version in text


def test_failing_rows_come_first_and_some_are_left_out(tmp_path: Path) -> None:
    rows = [suite("a", 1024, 1.0, seed) for seed in range(30)]
    rows += [suite("a", 1024, 0.5, 30), suite("a", 1024, 0.0, 31)]
    rows[0]["response"] = "long " * 1000
    page = page_of(write_report(tmp_path, {}, rows))
    shown = page.find_all("article")
    assert [str(one["class"][0]) for one in shown] == ["wrong", "partly", *["right"] * 12]
    assert "seed 31" in shown[0].text
    assert "partly, 50.0%" in shown[1].text
    assert "characters more" in shown[2].text
    assert "14 of the 32 rows" in page.text


def test_rows_without_scores_show_the_table_of_the_caller(tmp_path: Path) -> None:
    table = Table(["positions", "perplexity"], [["0 to 64", "12.3"]])
    page = page_of(write_report(tmp_path, {}, [{"nll": 1.0, "length": 64}], table=table))
    assert [cell.text for cell in page.find_all("td")][:2] == ["0 to 64", "12.3"]
    assert page.find_all("article") == []
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_report_is_replaced(tmp_path: Path) -> None:
    write_report(tmp_path, {}, FOUR[:1])
    path = write_report(tmp_path, {}, FOUR)
    assert "of the 6 rows" in page_of(path).text
    assert not list(tmp_path.glob(".*"))


def test_the_revision_is_that_of_a_tracked_package(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    tracked, installed = tmp_path / "tracked", tmp_path / ".venv" / "lwm"
    for package in (tracked, installed):
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("", encoding="utf-8")
    assert revision(tracked) == ""
    git("init", "-q")
    git("add", "tracked")
    git("commit", "-qm", "x")
    assert revision(tracked) == git("rev-parse", "HEAD")[:12]
    assert revision(installed) == ""
    (tracked / "__init__.py").write_text("# changed", encoding="utf-8")
    assert revision(tracked).endswith("-dirty")


def test_titles() -> None:
    assert title_of({"evaluation": "needle", "model": "smollm2"}) == "needle · smollm2"
    assert title_of({}, "file.jsonl") == "file.jsonl"
