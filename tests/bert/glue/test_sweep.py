"""Whole sweeps on tiny data: killed, failing, interrupted, started twice, and with one task starting from another."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from bert.composer_models import build_masked_lm
from bert.errors import RecipeError
from bert.glue import job as jobs
from bert.glue import sweep
from bert.glue.job import JobSpec
from bert.glue.results import Results
from bert.glue.schema import load_config
from bert.glue.view import View

from .conftest import MODEL, Recipe, write, write_glue

ROOT = Path(__file__).parents[3]


def started(recipe: Path, *overrides: str) -> Any:
    """A sweep in a process of its own, like glue.py's but without its imports."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=lambda: os._exit(sweep.main([str(recipe), *overrides])), daemon=False)
    process.start()
    return process


def finished(process: Any) -> int:
    process.join(120)
    assert process.exitcode is not None, "the sweep hangs"
    return process.exitcode


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_killed_three_times_the_table_is_that_of_an_undisturbed_sweep(recipe: Recipe, tmp_path: Path) -> None:
    path = recipe(seeds=[1, 2, 3])
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    begin = time.monotonic()
    assert finished(started(path, f"folder={undisturbed}")) == 0
    duration = time.monotonic() - begin
    for _ in range(3):
        process = started(path, f"folder={killed}")
        time.sleep(random.uniform(0.1, 0.6) * duration)
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
    assert finished(started(path, f"folder={killed}")) == 0
    for name in ("results.md", "results.csv"):
        assert (killed / name).read_text() == (undisturbed / name).read_text()
    expected = {result["key"]: result["metrics"] for result in lines(undisturbed)}
    assert len(expected) == 6
    # Bit for bit the same scores, and no job twice.
    assert {result["key"]: result["metrics"] for result in lines(killed)} == expected
    assert set(Counter(result["key"] for result in lines(killed)).values()) == {1}


def test_jobs_die_with_their_sweep(recipe: Recipe, tmp_path: Path) -> None:
    process = started(recipe(epochs=200))
    folder = tmp_path / "sweep" / "jobs"
    deadline = time.monotonic() + 60
    while not list(folder.glob("*/progress.json")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    time.sleep(1.0)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/progress.json")}
    time.sleep(1.5)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/progress.json")} == before


def test_a_failing_job_loses_itself_alone(
    recipe: Recipe, glue_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = ["sentence\tlabel", *["good\t1"] * sweep.CHECKED_ROWS]  # a mistake in these would be one before the sweep
    write(tmp_path / "own" / "train.tsv", [*seen, "bad\t7"])
    write(tmp_path / "own" / "dev.tsv", ["sentence\tlabel", "good\t1"])
    own = {"text": ["sentence"], "labels": ["0", "1"], "metrics": ["accuracy"], "source": str(tmp_path / "own")}
    tasks = {"cola": {"grid": {"optimizer.lr": [1e-2, 1e30]}}, "own": {"task": own}}
    assert sweep.main([str(recipe(tasks=tasks, seeds=[1]))]) == 1
    found = summary(tmp_path / "sweep")
    assert found["tasks"]["cola"]["best"] == 0
    assert found["tasks"]["cola"]["points"][0]["seeds"] == [1]
    reasons = {failed["job"]: failed["reason"] for failed in found["failed"]}
    assert reasons.keys() == {"cola seed 1 (lr=1e+30)", "own seed 1"}
    assert "row 101: the label '7' is none of 0, 1" in reasons["own seed 1"]
    assert "training stopped at batch" in reasons["cola seed 1 (lr=1e+30)"]
    text = (tmp_path / "sweep" / "results.md").read_text()
    assert "| own seed 1 | failed |" in text
    assert "the label '7'" in " ".join(capsys.readouterr().out.split())
    # Mended, the same command does the two that are missing, and not the third.
    write(tmp_path / "own" / "train.tsv", ["sentence\tlabel", "good\t1", "bad\t0"])
    tasks["cola"]["grid"]["optimizer.lr"] = [1e-2]
    assert sweep.main([str(recipe(tasks=tasks, seeds=[1]))]) == 0
    assert Counter(result["task"] for result in lines(tmp_path / "sweep")) == {"cola": 1, "own": 1}


def test_ones_own_task_in_parquet(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    for split in ("train", "validation"):
        table = pa.table({"text": ["good cat", "bad cat"] * 60, "label": ["good", "bad"] * 60})
        pq.write_table(table, tmp_path / "own" / f"{split}.parquet")
    own = {"text": ["text"], "labels": ["bad", "good"], "metrics": ["accuracy"], "source": str(tmp_path / "own")}
    assert sweep.main([str(recipe(tasks={"own": {"task": own}}, only=["own"], seeds=[1, 2]))]) == 0
    assert summary(tmp_path / "sweep")["tasks"]["own"]["points"][0]["seeds"] == [1, 2]


def test_a_dry_run_says_what_is_to_be_done(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(recipe(seeds=[1]))

    def states() -> list[str]:
        assert sweep.main([path, "dry_run=true"]) == 0
        lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if "seed 1" in line]
        assert [line[1].strip() for line in lines] == ["cola seed 1", "stsb seed 1"]
        return [line[2].strip() for line in lines]

    assert states() == ["queued", "queued"] and not list((tmp_path / "sweep").glob("**/*.json*"))
    assert sweep.main([path, "only=[cola]"]) == 0
    capsys.readouterr()
    assert states() == ["done", "queued"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ["bad", "ok"]}, "train.csv, row 1: the label 'good' is none of bad, ok"),
        ({"text": ["txt"]}, "no column txt"),
    ],
)
def test_mistakes_in_ones_own_task_are_said_before_any_job(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    for split in ("train", "validation"):
        write(tmp_path / "own" / f"{split}.csv", ["text,label", "a,good", "b,bad"])
    own = {"text": ["text"], "labels": ["bad", "good"], "metrics": ["accuracy"], "source": str(tmp_path / "own")}
    assert sweep.main([str(recipe(tasks={"own": {"task": {**own, **change}}}, only=["own"], seeds=[1]))]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert sweep.main([str(recipe(tasks={"own": {"task": {**own, "source": "no"}}}, only=["own"], seeds=[1]))]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "one's own task has train.csv, validation.csv" in error and "gluebenchmark" not in error
    assert sweep.main([str(recipe(tasks={"own": {"task": own}}, only=["own"], seeds=[1]))]) == 0
    assert "GLUE average" not in (tmp_path / "sweep" / "results.md").read_text()  # none of its tasks


def test_a_crashed_job_is_tried_again(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = jobs.train

    def crashing(spec: JobSpec) -> dict[str, Any]:
        marker = tmp_path / "crashed"
        if spec.task_name == "cola" and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if spec.task_name == "stsb":
            raise OSError("the disk is full")
        return train(spec)

    monkeypatch.setattr(jobs, "train", crashing)
    assert sweep.main([str(recipe(seeds=[1], retries=1))]) == 1
    (failed,) = summary(tmp_path / "sweep")["failed"]
    assert (failed["task"], failed["reason"]) == ("stsb", "OSError: the disk is full")
    assert [result["task"] for result in lines(tmp_path / "sweep")] == ["cola"]
    monkeypatch.undo()
    assert sweep.main([str(recipe(seeds=[1]))]) == 0


def test_two_sweeps_on_one_folder_share_the_work(recipe: Recipe, tmp_path: Path) -> None:
    path = recipe(num_slots=1)
    both = [started(path) for _ in range(2)]
    assert [finished(process) for process in both] == [0, 0]
    counts = Counter(result["key"] for result in lines(tmp_path / "sweep"))
    assert len(counts) == 4
    assert set(counts.values()) == {1}


def test_ctrl_c_stops_cleanly(recipe: Recipe, tmp_path: Path) -> None:
    process = started(recipe(epochs=200))
    deadline = time.monotonic() + 60
    while not list((tmp_path / "sweep" / "jobs").glob("*/progress.json")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    assert finished(process) == sweep.INTERRUPTED
    states = {failed["state"] for failed in summary(tmp_path / "sweep")["failed"]}
    assert states == {"queued"}
    assert not (tmp_path / "sweep" / "results.jsonl").exists()


def test_tasks_start_from_the_best_mnli_model_and_the_leaderboards_files(recipe: Recipe, tmp_path: Path) -> None:
    tasks = {"rte": {"start_from": "mnli", "seeds": [3]}, "mnli": {"grid": {"optimizer.lr": [1e-4, 2e-2]}}, "stsb": {}}
    path = recipe(tasks=tasks, seeds=[1, 2])
    assert sweep.main([str(path), "--test"]) == 0
    folder = tmp_path / "sweep"
    found = summary(folder)
    points = found["tasks"]["mnli"]["points"]
    best = max(range(2), key=lambda index: points[index]["score"]["mean"])
    assert found["tasks"]["mnli"]["best"] == best
    assert points[0]["score"]["mean"] != points[1]["score"]["mean"]
    assert points[0]["metrics"].keys() == {"accuracy_matched", "accuracy_mismatched"}
    expected = points[best]["jobs"][max(range(2), key=lambda index: points[best]["score"]["values"][index])]["key"]
    (rte,) = found["tasks"]["rte"]["points"][0]["jobs"]
    assert rte["start_key"] == expected
    spec = JobSpec.load(jobs.job_folder(folder, rte["key"]) / "job.json")
    assert spec.start.checkpoint == str(folder / "jobs" / expected / "model.pt")
    # The leaderboard's files: all rows, in order, labels by name where it wants names.
    files = {file.stem: list(csv.reader(file.open(), delimiter="\t")) for file in (folder / "submission").glob("*.tsv")}
    assert files.keys() == {"MNLI-m", "MNLI-mm", "AX", "RTE", "STS-B"}
    for name, rows in files.items():
        assert rows[0] == ["index", "prediction"]
        assert [row[0] for row in rows[1:]] == [str(index) for index in range(30 if name == "AX" else 40)], name
    assert {row[1] for row in files["RTE"][1:]} <= {"entailment", "not_entailment"}
    for name in ("MNLI-m", "AX"):
        assert {row[1] for row in files[name][1:]} <= {"entailment", "neutral", "contradiction"}
    assert all(0 <= float(row[1]) <= 5 for row in files["STS-B"][1:])
    assert (folder / "submission" / "submission.zip").stat().st_size > 0


def test_what_is_done_is_not_done_again_for_the_test_splits(recipe: Recipe, tmp_path: Path) -> None:
    data = write_glue(tmp_path / "glue")
    path = recipe(tasks={"mnli": {}, "rte": {"start_from": "mnli"}, "stsb": {}}, seeds=[1], data=str(data))
    folder, submission = tmp_path / "sweep", tmp_path / "sweep" / "submission"

    def runs(*arguments: str) -> Counter[str]:
        assert sweep.main([str(path), *arguments]) == 0
        return Counter(result["task"] for result in lines(folder))

    assert runs("only=[mnli]") == {"mnli": 1}
    assert runs() == {"mnli": 1, "rte": 1, "stsb": 1}
    # MNLI's model is there, since RTE starts from it; the other two were not kept.
    assert runs("--test") == {"mnli": 1, "rte": 2, "stsb": 2}
    before = {file.name: file.read_bytes() for file in submission.glob("*.tsv")}
    assert runs("--test") == {"mnli": 1, "rte": 2, "stsb": 2}
    # Another test split: predicted anew, with the same model.
    head, *rows = (data / "RTE" / "test.tsv").read_text().splitlines()
    write(data / "RTE" / "test.tsv", [head, *rows[:7]])
    assert runs("--test") == {"mnli": 1, "rte": 2, "stsb": 2}
    after = {file.name: file.read_bytes() for file in submission.glob("*.tsv")}
    assert {name for name in before if before[name] != after[name]} == {"RTE.tsv"}
    assert len(after["RTE.tsv"].splitlines()) == 8
    # Other names: of the class, of the file, which is the only one for RTE in the archive.
    assert runs("--test", "tasks.rte.task={submit_names: false, submission: {test: X}}")["rte"] == 2
    assert {row.split("\t")[1] for row in (submission / "X.tsv").read_text().splitlines()[1:]} <= {"0", "1"}
    with zipfile.ZipFile(submission / "submission.zip") as archive:
        assert set(archive.namelist()) == {"MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv", "STS-B.tsv", "X.tsv"}


def test_what_is_wrong_with_a_test_split_is_said_before_the_training(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_glue(tmp_path / "glue")
    command = [str(recipe(tasks={"cola": {}}, seeds=[1], data=str(data))), "--test"]
    write(data / "CoLA" / "test.tsv", ["index\tsentence", "0\tgood cat", "torn"])
    assert sweep.main(command) == 2
    assert "test.tsv: 1 rows with missing or surplus fields" in capsys.readouterr().err
    write(data / "CoLA" / "test.tsv", ["index\tsentence", *["0\tgood cat"] * sweep.CHECKED_ROWS, "torn"])
    assert sweep.main(command) == 1
    (failed,) = summary(tmp_path / "sweep")["failed"]
    assert "test.tsv: 1 rows with missing or surplus fields" in failed["reason"]
    assert not (tmp_path / "sweep" / "results.jsonl").exists()


@pytest.mark.parametrize("changed", ["CoLA/train.tsv", "CoLA/dev.tsv", "model/config.json"])
def test_what_changes_after_the_key_was_made_is_refused(recipe: Recipe, tmp_path: Path, changed: str) -> None:
    root = write_glue(tmp_path / "glue")
    build_masked_lm("m2_bert", MODEL, train_mask_rate=0.3, eval_mask_rate=0.15).model.save_pretrained(root / "model")
    spec = specification(recipe(tasks={"cola": {}}, data=str(root), checkpoint=str(root / "model")))
    with (root / changed).open("a") as file:
        file.write("\n" if changed.endswith("json") else "gj04\t1\t\tthe good cat\n")
    spec.folder.mkdir(parents=True)
    with pytest.raises(RecipeError, match=f"{Path(changed).parts[0]}.* has changed since the sweep was started"):
        jobs.train(spec)


def test_no_silent_fallback_where_mnli_fails(recipe: Recipe, tmp_path: Path) -> None:
    tasks = {"mnli": {"optimizer": {"lr": 1e30}}, "rte": {"start_from": "mnli"}, "stsb": {}}
    assert sweep.main([str(recipe(tasks=tasks, seeds=[1]))]) == 1
    failed = {entry["task"]: entry for entry in summary(tmp_path / "sweep")["failed"]}
    assert failed.keys() == {"mnli", "rte"}
    assert failed["rte"]["state"] == "blocked"
    assert "no job of mnli, which it starts from, was finished" in failed["rte"]["reason"]


def test_the_live_table(recipe: Recipe, tmp_path: Path) -> None:
    config = load_config(recipe(tasks={"cola": {"grid": {"epochs": [2]}}}))
    plan = sweep.Sweep(config, threads=1)
    plan._release()
    first = plan.jobs[0]
    assert first.spec is not None
    first.state = sweep.RUNNING
    progress = {"step": 3, "steps": 10, "seconds_left": 70.2, "loss": 0.51, "metric": {}}
    jobs.write_json(first.spec.folder / "progress.json", progress)
    terminal = io.StringIO()
    with View(plan.jobs, Console(file=terminal, force_terminal=True, width=120)):
        pass
    shown = terminal.getvalue()
    for part in ("1 running, 1 queued", "cola", "epochs=2", "3/10", "loss 0.510", "1:10"):
        assert part in shown


def specification(path: Path, *overrides: str) -> JobSpec:
    plan = sweep.Sweep(load_config(path, overrides), threads=1)
    plan._release()
    assert plan.jobs[0].spec is not None
    return plan.jobs[0].spec


def test_a_job_run_twice_is_the_same_bit_for_bit(recipe: Recipe, tmp_path: Path) -> None:
    path = recipe(tasks={"stsb": {}}, seeds=[5])
    models, results = [], []
    for name in ("first", "second"):
        spec = dataclasses.replace(specification(path, f"folder={tmp_path / name}"), outputs=[jobs.MODEL])
        spec.folder.mkdir(parents=True)
        results.append(jobs.train(spec))
        models.append(torch.load(spec.folder / "model.pt", weights_only=True)["weights"])
    assert results[0]["metrics"] == results[1]["metrics"]
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]), name


def test_what_defines_a_job_is_its_key(
    recipe: Recipe, glue_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "read_rows", lambda *_, **__: None)  # some of these could not be read
    path = recipe()
    key = specification(path).key
    for override in ("optimizer.lr=0.5", "epochs=2", "seeds=[9]", "model.config.hidden_size=32", "pooling=mean"):
        assert specification(path, override).key != key, override
    swapped = "{source: sentence, sentence: source, label: label, judgement: judgement}"
    for override in (
        f"tasks.cola.task.tsv_columns={swapped}",
        "tasks.cola.task.tsv_names=[sentence,label,judgement,source]",
        "tasks.cola.task.tsv_headerless=[train]",
        "tasks.cola.task.train=validation",
        "cuda_graphs=false",
    ):
        assert specification(path, override).key != key, override
    for override in ("num_slots=1", "folder=elsewhere", "loggers={jsonl: {}}", "retries=3", "python_log_level=debug"):
        assert specification(path, override).key == key, override
    copy = tmp_path / "copy" / "CoLA"
    copy.mkdir(parents=True)
    for name in ("train", "dev"):
        (copy / f"{name}.tsv").write_bytes((glue_data / "CoLA" / f"{name}.tsv").read_bytes())
    assert specification(path, f"data={copy.parent}", "only=[cola]").key == key  # the data's content, not its place
    with (copy / "train.tsv").open("a") as file:
        file.write("gj04\t1\t\tthe good cat\n")
    assert specification(path, f"data={copy.parent}", "only=[cola]").key != key
    plan = sweep.Sweep(load_config(path), threads=1)
    plan.device = "gpu"
    plan._release()
    assert plan.jobs[0].spec is not None
    assert (plan.jobs[0].spec.device, plan.jobs[0].spec.key != key) == ("gpu", True)


def test_a_job_runs_from_its_file(recipe: Recipe, tmp_path: Path) -> None:
    """What a job's process does where a fork of the sweep could not use its GPU."""
    spec = specification(recipe(tasks={"cola": {}}, seeds=[5]))
    path = spec.save()
    assert JobSpec.load(path) == spec
    for _ in range(2):  # the second finds it done
        process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(jobs.main([str(path)])))
        process.start()
        assert finished(process) == jobs.DONE
    assert [result["key"] for result in lines(tmp_path / "sweep")] == [spec.key]


def test_results_survive_a_torn_line(tmp_path: Path) -> None:
    results = Results(tmp_path)
    assert results.read() == {}
    results.append({"key": "a", "score": 1})
    with results.path.open("a") as file:
        file.write('{"key": "b", "sco')
    results.append({"key": "c", "score": 3})
    results.append({"key": "a", "score": 2})
    assert {key: result["score"] for key, result in results.read().items()} == {"a": 2, "c": 3}


def test_the_command_line(recipe: Recipe, tmp_path: Path) -> None:
    """The real glue.py: exit code, files, and what a job takes besides its steps."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "glue.py"), str(recipe(tasks={"stsb": {}}, seeds=[1]))]
    output = tmp_path / "out.json"
    done = subprocess.run(
        [*command, f"output={output}"], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "spearman" in done.stdout
    found = json.loads(output.read_text())
    assert found["command"] == "python glue.py tiny.yaml output=out.json"
    (job,) = found["tasks"]["stsb"]["points"][0]["jobs"]
    assert found["date"] == job["date"][:10]
    assert "stsb, train: 40 rows, but the data set is known to have 5749" in found["warnings"]
    assert found["warnings"][0] in (tmp_path / "sweep" / "results.md").read_text()
    seconds = job["seconds"]
    assert seconds["total"] - seconds["training"] - seconds["evaluation"] < 20
    assert job["samples_per_second"]["train"] > 0
