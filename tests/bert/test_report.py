"""The page of results, from files as studies write them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from bert import tables
from bert.report import StudyResults, main, pretraining_table, search_table

MADE = {
    "command": "python main.py m2-base.yaml",
    "date": "2026-11-20",
    "device": "a GPU",
    "versions": {"torch": "2.7.0"},
}


def about(job: str, run: str | None = None, outcome: str = "finished", **more: Any) -> dict[str, Any]:
    values = {"name": "wiki", "run": run or job, "job": job, "point": {}, "recipe": job, "start": None, "key": "k"}
    return {**values, "outcome": outcome, "commit": "0123456789abcdef", **more}


def pretrained(loss: float | None, study: dict[str, Any], **changes: Any) -> dict[str, Any]:
    points = [0.0, 1e6, 2e6]
    return {
        **MADE,
        "kind": "pretrain",
        "model": "m2_bert",
        "parameters": 80_267_328,
        "lr": 8e-4,
        "max_seq_len": 128,
        "evaluation_loss": loss,
        "evaluation_accuracy": 0.4,
        "steps": 20,
        "tokens": 2_000_000,
        "minutes": 1.5,
        "tokens_per_second": 500_000.0,
        "mfu": 0.25,
        "train": {"step": [0, 10, 20], "tokens": points, "minutes": [0, 1, 2], "loss": [9, 8, 7]},
        "evaluation": {
            "step": [20],
            "tokens": [2e6],
            "minutes": [2],
            "loss": [loss] if loss else [],
            "accuracy": [0.4],
        },
        "study": study,
        **changes,
    }


def tuned(start: str) -> dict[str, Any]:
    def metric(mean: float) -> dict[str, Any]:
        return {"mean": mean, "std": 0.01, "values": [mean]}

    point = {"metrics": {"accuracy": metric(0.9)}, "jobs": [{"device": "a GPU"}]}
    averages = {name: {"average": None, "columns": {}} for name in ("paper", "mosaicbert", "devlin")}
    averages["paper"]["columns"] = {"SST-2": 0.9}
    tasks = {"sst2": {"best": 0, "points": [point]}, "rte": {"best": None, "points": []}}
    named = {"kind": "glue", "run_name": "x", "tasks": tasks, "averages": averages, "failed": []}
    return {**MADE, **named, "study": about("tasks", start=start, recipe="m2-base-960")}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results" / "wiki"
    folder.mkdir(parents=True)
    jobs: dict[str, Any] = {name: {} for name in ("base", "tasks", "context", "words")}
    files = {
        "study": {
            "kind": "study",
            "name": "wiki",
            "title": "A title",
            "data": "some text",
            "jobs": {"rate": {"grid": {"lr": [1]}}, **jobs},
        },
        "rate-1": pretrained(3.5, about("rate", "rate-1", point={"optimizer.lr": 0.001})),
        "rate-2": pretrained(3.25, about("rate", "rate-2", point={"optimizer.lr": 0.002})),
        "rate-3": pretrained(None, about("rate", "rate-3", "diverged", point={"optimizer.lr": 1})),
        "base-1": pretrained(3.0, about("base", "base-1", recipe="m2-base-plus")),
        "base-2": pretrained(3.2, about("base", "base-2")),
        "tasks": tuned("base"),
        "context": {
            **MADE,
            "kind": "context_loss",
            "rows": [
                {"model": "m", "context": context, "loss": loss, "standard_error": 0.01}
                for context, loss in ((128, 3.4), (2048, 3.1))
            ],
            "study": about("context", start="base"),
        },
        "words": {
            **MADE,
            "kind": "fill_mask",
            "model": "m",
            "texts": [{"text": "The | [MASK].", "masks": [[{"word": "sun", "probability": 0.5}]]}],
            "study": about("words", start="base"),
        },
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "reading.md").write_text("What it means.\n")
    return tmp_path / "results"


def rows(page: str, first: str) -> list[str]:
    line = next(line for line in page.splitlines() if line.startswith(f"| {first} "))
    return [cell.strip() for cell in line.strip("| ").split(" | ")]


def test_what_was_tuned_from_another_seed_is_named_so(results: Path, tmp_path: Path) -> None:
    other = tuned("base")
    other["study"] |= {"run": "tasks-mean", "start_seed": 18}
    (results / "wiki/tasks-mean.json").write_text(json.dumps(other))
    assert main(["--results", str(results), "--out", str(tmp_path / "results.md")]) == 0
    page = (tmp_path / "results.md").read_text()
    assert "| tasks |  |" in page and "| tasks-mean (start's seed 18) |  |" in page


def test_the_page_says_what_the_files_say(results: Path, tmp_path: Path) -> None:
    out = tmp_path / "docs" / "results.md"
    assert main(["--results", str(results), "--out", str(out)]) == 0
    page = out.read_text()
    assert "## A title" in page and "Text: some text. a GPU; 2026-11-20; torch 2.7.0; commit 0123456." in page
    assert "What it means." in page
    # Mean and deviation over two seeds; 36.7 B tokens at 8 x 500,000 tokens/s are two and a half hours.
    assert rows(page, "base")[:9] == [
        *("base", "80,267,328", "0.0008", "2", "20", "2.0 M", "3.100 ± 0.141", "40.0 ± 0.0", "500,000 ± 0")
    ]
    assert rows(page, "base")[9:] == ["25.0 ± 0.0", "1.5 ± 0.0", "2.5 h"]
    assert rows(page, "lr 0.002") == ["lr 0.002", "20", "3.250"]
    assert rows(page, "lr 1") == ["lr 1", "20", "diverged"]
    assert "| base |  |  |  |  | 90.0 ± 1.0 |  |  |  | 90.0 (1 of 8) |" in page
    assert rows(page, "published: m2-base-960 (second-hand)")[-1] == "80.9 (8 of 8)"
    assert rows(page, "published: m2-base")[-1] == "79.9 (8 of 8)"  # what base, of m2-base-plus, is in form
    assert (
        "| start | 128 tokens | 2,048 tokens |\n| --- | --- | --- |\n| base | 3.400 ± 0.010 | 3.100 ± 0.010 |" in page
    )
    assert "| The \\| [MASK]. | sun 0.50 |" in page
    assert "| base-1 | `python main.py m2-base.yaml` |" in page
    assert "](figures/wiki_loss.png)" in page
    assert (tmp_path / "docs/figures/wiki_loss.png").stat().st_size > 10_000


def test_unfinished_seeds_are_apart_and_a_search_is_best_of_those_run() -> None:
    study = StudyResults({"jobs": {"base": {}, "rate": {"grid": {"lr": [1, 2]}, "seeds": []}}}, Path())
    study.runs = [
        pretrained(2.0, about("base", "base-seed-1")),
        pretrained(4.0, about("base", "base-seed-2", "unfinished"), lr=None),
        pretrained(3.0, about("rate", "rate-1", point={"lr": 1})),
    ]
    table = pretraining_table(study)
    assert [(row[0], row[2], row[3], row[6]) for row in table[1:]] == [
        ("base", "0.0008", "1", "2.000"),
        ("base (unfinished)", "", "1", "4.000"),
    ]
    assert study.points("rate") == 2
    two = [*study.runs[2:], pretrained(3.5, about("rate", "rate-2", point={"lr": 2}))]
    assert [row[2] for row in search_table(two, 2)[1:]] == ["3.000 (best)", "3.500"]
    assert search_table(two[:1], 2)[1][2] == "3.000 (best of those run)"
    assert search_table(two[:1], 1)[1][2] == "3.000"  # the only one is not the best of any


def test_without_studies_the_page_says_so(tmp_path: Path) -> None:
    assert main(["--results", str(tmp_path), "--out", str(tmp_path / "results.md")]) == 0
    assert "No study has been run." in (tmp_path / "results.md").read_text()


def test_other_files_beside_a_study_are_named(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    old = pretrained(1.0, about("gone"))
    (results / "wiki" / "old.json").write_text(json.dumps(old))
    out = str(tmp_path / "results.md")
    with caplog.at_level(logging.WARNING):
        assert main(["--results", str(results), "--out", out]) == 0
    assert "has no job 'gone' any more" in caplog.text
    for content, message in (("{}", "lacks 'kind' or 'study'"), ("[", "cannot be read as JSON"), ("[]", "no object")):
        (results / "wiki" / "old.json").write_text(content)
        assert main(["--results", str(results), "--out", out]) == 2
        assert message in capsys.readouterr().err


def test_the_papers_tables_take_up_a_studys_scores(results: Path) -> None:
    lines = {line.figure: line for line in tables.glue(results).lines if line.row.startswith("base in study wiki")}
    ours = lines["SST-2"].ours
    assert ours is not None and ours.value == 90.0
    assert lines["SST-2"].paper.value == 92.3 and lines["SST-2"].difference == "-2.30"
    assert lines.keys() == {"SST-2"}  # a task that was not run has no line
