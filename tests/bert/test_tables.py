"""The paper's tables: published figures with their source, ours from results, and the difference."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bert import published, tables
from bert.errors import DataError
from bert.glue.metrics import AVERAGES

HERE = {"command": "python -m bert.tables", "date": "2026-01-01"}
ROOT = Path(__file__).parents[2]


def line(table: tables.PaperTable, row: str, figure: str) -> tables.Line:
    (found,) = [
        line for line in table.lines if line.row.startswith(f"{row} (") or line.row == row if line.figure == figure
    ]
    return found


def speed(path: Path, *rows: tuple[str, int, float]) -> None:
    values: list[dict[str, Any]] = [{"model": m, "length": length, "tokens_per_ms": v} for m, length, v in rows]
    values.append({"model": "hf-bert-base", "length": 8192, "error": "out of memory"})
    content = {"device": "NVIDIA H200", "versions": {}, "date": "2026-01-02", "command": "python b.py", "rows": values}
    path.write_text(json.dumps(content))


def glue_run(name: str, averages: dict[str, Any]) -> dict[str, Any]:
    empty = {"average": None, "columns": {}, "missing": []}
    job = {"device": "NVIDIA H200"}
    return {
        "kind": "glue",
        "run_name": name,
        "command": "python glue.py x.yaml",
        "date": "2026-01-02",
        "tasks": {"cola": {"best": 0, "points": [{"jobs": [job]}]}},
        "failed": [],
        "averages": {**{convention: empty for convention in AVERAGES}, **averages},
    }


def test_sizes_are_computed_and_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    table = tables.models(HERE)
    found = line(table, "m2-base", "parameters")
    assert found.ours is not None
    assert found.ours.value == 80_267_328
    assert found.difference == "+0.3%"
    assert line(table, "m2-base", "forward pass, MFLOP a token").cells()[2] == "unconfirmed"


def test_published_averages_are_those_of_their_columns() -> None:
    for name, columns in published.GLUE_COLUMNS.items():
        convention, figure = published.GLUE_AVERAGE[name]
        assert columns.keys() == AVERAGES[convention].keys(), name
        mean = sum(column.value or 0 for column in columns.values()) / len(columns)
        assert round(mean, 1) == figure.value, name


def test_glue_takes_results_in_the_convention_of_the_published_figure(tmp_path: Path) -> None:
    columns = {"CoLA": 0.5}
    run = glue_run("m2-base", {"paper": {"average": 0.801, "columns": columns, "missing": []}})
    (tmp_path / "glue_m2-base.json").write_text(json.dumps(run))
    own = glue_run("my-model", {"paper": {"average": None, "columns": columns, "missing": ["RTE"]}})
    own["failed"] = [{"job": "cola seed 2"}]
    (tmp_path / "glue_own.json").write_text(json.dumps(own))
    (tmp_path / "glue_speed.json").write_text("{}")  # of another kind
    table = tables.glue(tmp_path)
    average = line(table, "m2-base", "average")
    assert average.cells()[2:] == [
        "79.90 (github.com/HazyResearch/m2, bert/README.md)",
        "80.10 (`python glue.py x.yaml`, NVIDIA H200, 2026-01-02)",
        "+0.20",
    ]
    assert line(table, "m2-base", "CoLA").cells()[2:4] == [
        "unconfirmed",
        "50.00 (`python glue.py x.yaml`, NVIDIA H200, 2026-01-02)",
    ]
    assert line(table, "m2-base-960", "RTE").cells()[2].endswith("second-hand, unconfirmed)")
    assert line(table, "m2-large-341m", "average").cells()[3:] == ["", ""]
    assert line(table, "hf-bert-base", "average").paper.value == 79.6
    (partial,) = [own for own in table.lines if own.row.startswith("my-model")]
    assert partial.figure == "CoLA"
    assert "NVIDIA H200, jobs not done, 2026" in partial.cells()[3]
    (tmp_path / "a_study").mkdir()
    for start in ("m2-base", "my-pretraining", None):  # one recipe fine-tunes all, the last from random weights
        study = {"name": "wikipedia", "recipe": "any-run", "start": start}
        (tmp_path / "a_study" / f"{start}-glue.json").write_text(json.dumps({**run, "study": study}))
    table = tables.glue(tmp_path)
    found = line(table, "m2-base in study wikipedia", "average")
    assert found.cells()[2].startswith("79.90") and found.cells()[3].startswith("80.10")
    for name in ("my-pretraining", "any-run"):
        assert any(own.row.startswith(f"{name} in study wikipedia") and own.ours is not None for own in table.lines)
    study = {"name": "wikipedia", "recipe": "any-run", "start": "m2-base"}
    for sweep in ("m2-base-glue", "m2-base-glue-mean"):  # two ways of fine-tuning one model
        (tmp_path / "a_study" / f"{sweep}.json").write_text(json.dumps({**run, "study": {**study, "run": sweep}}))
    table = tables.glue(tmp_path)
    for sweep in ("m2-base-glue", "m2-base-glue-mean"):
        assert line(table, f"m2-base ({sweep}) in study wikipedia", "average").cells()[3].startswith("80.10")
    (tmp_path / "glue_twice.json").write_text(json.dumps(own))
    with pytest.raises(DataError, match=r"glue_twice\.json: another file here has the run_name 'my-model' too"):
        tables.glue(tmp_path)


def test_throughput_and_predicted_hours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    empty = tables.throughput(tmp_path)
    assert line(empty, "m2-base", "4096 tokens, tokens/ms").ours is None
    assert line(empty, "m2-base", "1024 tokens, tokens/ms").cells()[2] == "unconfirmed"
    assert line(empty, "hf-bert-base", "8192 tokens, tokens/ms").cells()[2].startswith("out of memory")
    speed(tmp_path / "encoder_forward.json", ("m2-base", 4096, 707.8), ("m2-fft-reference", 128, 5.0))
    table = tables.throughput(tmp_path)
    assert line(table, "m2-base", "4096 tokens, tokens/ms").difference == "+100.0%"
    assert line(table, "m2-fft-reference", "128 tokens, tokens/ms").cells()[2] == ""
    tables.draw(table, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    speed(tmp_path / "training_step.json", ("m2-base", 128, 1000.0))
    cost = tables.pretraining(tmp_path, HERE)
    tokens = 70_000 * 4096 * 128
    hours = line(cost, "m2-base", "hours on one device").ours
    assert hours is not None
    assert hours.value == pytest.approx(tokens / 1e6 / 3600)
    assert hours.machine == "predicted for one NVIDIA H200"
    assert line(cost, "m2-base", "steps").difference == "+0.0%"
    assert line(cost, "bert-base", "hours on one device").ours is None


def test_the_command_writes_all_three(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert tables.main(["--results", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "tables.md").read_text()
    for part in (
        "## GLUE",
        "| m2-base | parameters | 80,000,000 (github.com/HazyResearch/m2, bert/README.md) | 80,267,328 (",
        "79.60",
    ):
        assert part in text
    content = json.loads((tmp_path / "out" / "tables.json").read_text())
    assert content["tables"].keys() == {"models", "glue", "throughput", "pretraining"}
    assert (tmp_path / "out" / "throughput.png").exists()
    assert re.search(r"Cost of pretraining", capsys.readouterr().out)
    (tmp_path / "encoder_forward.json").write_text('{"rows": [{}]}')
    assert tables.main(["--results", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "encoder_forward.json is no benchmark of speed" in capsys.readouterr().err
