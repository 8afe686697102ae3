"""Studies: what follows from a YAML, and what is run again. Most runs are a stand-in for main.py that takes no time."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from bert.errors import DataError, RecipeError
from bert.recipe.schema import TrainConfig, load_config
from bert.study import runner
from bert.study.__main__ import main
from bert.study.records import curves, read_metrics, recipe_hash
from bert.study.runner import Study
from bert.study.schema import load_study, runs_of

ROOT = Path(__file__).parents[3]

# Learns best at 0.01, diverges above 1, fails where the file "fail" names it, and takes its time where "slow" is there.
STAND_IN = """
import json, pathlib, sys, time, signal
values = dict(word.partition("=")[::2] for word in sys.argv[2:])
with open("calls.txt", "a") as file:
    file.write(values["run_name"] + "\\n")
if pathlib.Path("fail").exists() and pathlib.Path("fail").read_text() in values["run_name"]:
    sys.exit("this run fails")
lr = float(values.get("optimizer.lr", 0.02))
folder = pathlib.Path("runs", values["run_name"])
folder.mkdir(parents=True, exist_ok=True)
path = folder / "metrics.jsonl"
done = len(path.read_text().splitlines()) if path.exists() else 0
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
with path.open("a") as file:
    for batch in range(done + 1, int(values["max_duration"].removesuffix("ba")) + 1):
        line = {"event": "train", "batch": batch, "token": 128 * batch, "loss/train/total": 5 - batch / 100}
        line |= {"time/train": batch / 3600, "throughput/tokens_per_sec": 128.0}
        file.write(json.dumps(line) + "\\n")
        file.flush()
        if pathlib.Path("slow").exists():
            time.sleep(0.05)
        if stopped:
            sys.exit(143)
        if lr > 1:
            sys.exit(3)
    line = {"event": "eval", "batch": batch, "token": 128 * batch}
    line |= {"metrics/eval/MaskedCrossEntropy": 2 + abs(lr - 0.01), "metrics/eval/MaskedAccuracy": 0.5}
    file.write(json.dumps(line) + "\\n")
"""
GLUE_STAND_IN = """
import json, pathlib, sys
values = dict(word.partition("=")[::2] for word in sys.argv[2:])
assert pathlib.Path(values["checkpoint"]).is_dir()
if pathlib.Path("fail").exists():
    pathlib.Path(values["output"]).write_text("{}")
    sys.exit("half of it")
pathlib.Path(values["output"]).write_text(json.dumps({"kind": "glue", "tasks": {}, "averages": {}, "failed": []}))
open("calls.txt", "a").write(values["run_name"] + "\\n")
"""
COMMAND = """
import json, pathlib, sys
assert pathlib.Path(sys.argv[1]).is_dir()
pathlib.Path(sys.argv[2]).write_text(json.dumps({"kind": "made", "from": sys.argv[1]}))
open("calls.txt", "a").write("command\\n")
"""
JOBS: dict[str, Any] = {
    "search": {"pretrain": "recipe.yaml", "grid": {"optimizer.lr": [0.1, 0.01, 10]}, "set": {"max_duration": "4ba"}},
    "base": {"pretrain": "recipe.yaml", "best_of": "search", "seeds": [1, 2]},
    "timed": {"pretrain": "recipe.yaml", "minutes": 0.25, "speed_of": "base"},
    "on": {"pretrain": "recipe.yaml", "checkpoint": "base", "set": {"max_duration": "2ba"}},
    "tasks": {"glue": "glue.yaml", "checkpoint": "base"},
    "look": {"command": ["look.py", "{checkpoint}", "{output}"], "checkpoint": "base", "output": "look.json"},
}
ALL = {"search-lr-0.1", "search-lr-0.01", "search-lr-10", "base-seed-1", "base-seed-2", "timed", "on", "tasks"}


class Place:
    """A folder with stand-ins for the entry points, recipes and a study."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in (("main.py", STAND_IN), ("glue.py", GLUE_STAND_IN), ("look.py", COMMAND)):
            (folder / name).write_text(text)
        recipe = (ROOT / "yamls/pretrain/m2-demo.yaml").read_text()
        (folder / "recipe.yaml").write_text(recipe)
        (folder / "shared").mkdir()
        for name in ("m2-small.yaml", "shared/glue.yaml"):
            text = (ROOT / "yamls/finetune-glue" / name).read_text()
            (folder / {"m2-small.yaml": "glue.yaml"}.get(name, name)).write_text(text)

    def write(self, jobs: dict[str, Any], **changes: Any) -> Path:
        path = self.folder / "study.yaml"
        common = {"max_duration": "10ba", "global_train_batch_size": 1, "device_train_microbatch_size": 1}
        values = {"name": "s", "title": "A study", "data": "made up", "set": common, "jobs": jobs, **changes}
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    def calls(self) -> list[str]:
        path = self.folder / "calls.txt"
        found = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return [re.sub("^s-|-[0-9a-f]{6}$", "", name) for name in found]

    def result(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / "results/s" / f"{name}.json").read_text())


# What the tests here have read, by the recipe's text and its changes: the same few recipes, tens of times.
READ: dict[tuple[str, ...], TrainConfig] = {}
HASHES: dict[int, tuple[TrainConfig, str]] = {}  # with the recipe, so that no other is at its address


def read_once(path: str, overrides: list[str]) -> TrainConfig:
    key = (str(path), Path(path).read_text(), *overrides)
    if key not in READ:
        READ[key] = load_config(path, overrides)
    return READ[key]


def hashed_once(config: TrainConfig) -> str:
    if id(config) not in HASHES:
        HASHES[id(config)] = (config, recipe_hash(config))
    return HASHES[id(config)][1]


@pytest.fixture(autouse=True)
def hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "recipe_hash", hashed_once)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The runs here take no time, and the recipes, which have no base, are alike."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(runner, "load_config", read_once)
    return Place(tmp_path)


def test_runs_follow_from_each_other_and_nothing_is_done_twice(place: Place) -> None:
    path = str(place.write(JOBS))
    assert main([path, "--slots", "2"]) == 0
    assert sorted(place.calls()) == sorted([*ALL, "command"])
    # The best of the search, not the one that diverged.
    assert [place.result(f"search-lr-{lr}")["study"]["outcome"] for lr in ("0.1", "0.01", "10")] == [
        "finished",
        "finished",
        "diverged",
    ]
    base = place.result("base-seed-2")
    assert (base["lr"], base["seed"], base["evaluation_loss"], base["steps"]) == (0.01, 2, 2.0, 10)
    assert "optimizer.lr=0.01" in base["command"] and base["recipe_hash"] != place.result("base-seed-1")["recipe_hash"]
    assert base["parameters"] > 0 and base["versions"]["torch"] and base["device"]
    # A quarter of a minute at 128 tokens a second and as many a step.
    assert place.result("timed")["steps"] == 15
    assert re.fullmatch("runs/s-base-seed-1-[0-9a-f]{6}", place.result("look")["from"])
    assert place.result("tasks")["study"]["start"] == "base"
    load_path = re.search("load_path=(.*?) load_weights_only=true", place.result("on")["command"])
    assert load_path is not None and re.fullmatch("runs/s-base-seed-1-[0-9a-f]{6}/latest-rank0.pt", load_path[1])

    assert main([path]) == 0
    assert place.calls() == []


def test_results_travel_and_checkpoints_are_made_again_only_where_they_are_needed(place: Place) -> None:
    assert main([str(place.write(JOBS)), "--slots", "2"]) == 0
    place.calls()
    for folder in (place.folder / "runs").iterdir():  # another machine, with the committed results
        subprocess.run(["rm", "-r", folder], check=True)
    assert main([str(place.write(JOBS))]) == 0
    assert place.calls() == []
    path = place.folder / "results/s/base-seed-1.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "minutes": 99}))
    more = {**JOBS, "again": {"glue": "glue.yaml", "checkpoint": "base", "set": {"epochs": 2}}}
    assert main([str(place.write(more))]) == 0
    assert place.calls() == ["base-seed-1", "again"]
    assert place.result("base-seed-1")["minutes"] == 99  # what followed from the first result still does


def test_nothing_starts_from_a_run_that_diverged(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    jobs = {
        "base": {"pretrain": "recipe.yaml", "set": {"optimizer.lr": 10}},
        "tasks": {"glue": "glue.yaml", "checkpoint": "base"},
    }
    path = str(place.write(jobs))
    for calls in (["base"], []):  # nor is it made again
        assert main([path]) == 1
        assert place.calls() == calls
        assert "tasks: base, which it starts from, has diverged" in caplog.text
        caplog.clear()
    subprocess.run(["rm", "-r", place.folder / "runs"], check=True)
    assert main([path]) == 1
    assert place.calls() == []


def test_nothing_starts_from_a_run_that_diverges_when_it_is_made_again(place: Place) -> None:
    jobs = {"base": {"pretrain": "recipe.yaml"}, "tasks": {"glue": "glue.yaml", "checkpoint": "base"}}
    path = str(place.write(jobs))
    assert main([path]) == 0
    place.calls()
    subprocess.run(["rm", "-r", place.folder / "runs", place.folder / "results/s/tasks.json"], check=True)
    (place.folder / "main.py").write_text(STAND_IN.replace("if lr > 1:", "if batch == 3:"))
    assert main([path]) == 1
    assert place.calls() == ["base"]
    assert not (place.folder / "results/s/tasks.json").exists()
    assert place.result("base")["study"]["outcome"] == "finished"  # the first result stays


def test_a_run_that_diverged_is_not_made_again_when_its_search_is(place: Place) -> None:
    jobs = {
        "search": {"pretrain": "recipe.yaml", "grid": {"optimizer.lr": [0.1]}, "set": {"max_duration": "4ba"}},
        "base": {"pretrain": "recipe.yaml", "best_of": "search"},
        "tasks": {"glue": "glue.yaml", "checkpoint": "base"},
    }
    path = str(place.write(jobs))
    (place.folder / "main.py").write_text(STAND_IN.replace("if lr > 1:", "if batch == 5:"))
    assert main([path]) == 1
    assert place.calls() == ["search-lr-0.1", "base"]
    subprocess.run(["rm", "-r", place.folder / "runs", place.folder / "results/s/search-lr-0.1.json"], check=True)
    assert main([path]) == 1
    assert place.calls() == ["search-lr-0.1"]


def test_what_a_job_needs_comes_right_before_it(place: Place) -> None:
    small = {"pretrain": "recipe.yaml", "set": {"max_duration": "2ba"}}
    jobs = {"b": small, "a": small, "of_b": {**small, "checkpoint": "b"}, "of_a": {**small, "checkpoint": "a"}}
    assert main([str(place.write(jobs)), "--slots", "1", "--only", "of_a", "of_b"]) == 0
    assert place.calls() == ["a", "of_a", "b", "of_b"]


def test_what_starts_from_another_seed(place: Place) -> None:
    assert main([str(place.write(JOBS)), "--only", "look"]) == 0
    place.calls()
    jobs = {**JOBS, "second": {**JOBS["look"], "checkpoint_seed": 2, "output": "second.json"}}
    assert main([str(place.write(jobs)), "--only", "second"]) == 0
    assert place.calls() == ["base-seed-2", "command"]  # that seed alone
    assert re.fullmatch("runs/s-base-seed-2-[0-9a-f]{6}", place.result("second")["from"])
    assert (place.result("second")["study"]["start"], place.result("second")["study"]["start_seed"]) == ("base", 2)
    assert place.result("look")["study"]["start_seed"] is None


def test_a_changed_recipe_is_run_again_with_what_follows(place: Place) -> None:
    assert main([str(place.write(JOBS)), "--slots", "2"]) == 0
    place.calls()
    changed = {**JOBS, "base": {**JOBS["base"], "set": {"max_duration": "12ba"}}}
    assert main([str(place.write(changed)), "--slots", "2"]) == 0
    assert sorted(place.calls()) == ["base-seed-1", "base-seed-2", "command", "on", "tasks"]
    assert place.result("base-seed-1")["steps"] == 12


def test_a_changed_fine_tuning_recipe_is_run_again_and_a_stopped_one_leaves_the_result(place: Place) -> None:
    path = str(place.write(JOBS))
    assert main([path, "--slots", "2"]) == 0
    before = place.result("tasks")
    recipe = place.folder / "glue.yaml"
    recipe.write_text(recipe.read_text() + "\nretries: 3\n")
    place.calls()
    (place.folder / "fail").write_text("nothing of main.py's")
    assert main([path, "--only", "tasks"]) == 1
    assert place.result("tasks") == before
    (place.folder / "glue.py").write_text("")  # ends well, and writes nothing: what was left there is not its result
    assert main([path, "--only", "tasks"]) == 1
    assert place.result("tasks") == before
    (place.folder / "glue.py").write_text(GLUE_STAND_IN)
    (place.folder / "fail").unlink()
    assert main([path]) == 0
    assert place.calls() == ["tasks"] and place.result("tasks")["study"]["key"] != before["study"]["key"]


def test_a_grid_is_not_overruled_from_the_command_line(place: Place) -> None:
    study = Study(load_study(place.write(JOBS, set={"optimizer.lr": 0.5}), ["set.optimizer.lr=0.9"]))
    rates = {run.name: study.plan(run).config.optimizer["lr"] for run in runs_of(study.config) if run.job == "search"}
    assert rates == {"search-lr-0.1": 0.1, "search-lr-0.01": 0.01, "search-lr-10": 10}


def test_the_speed_of_a_search_and_its_best_take_all_of_it(place: Place) -> None:
    timed = {"pretrain": "recipe.yaml", "best_of": "search", "minutes": 0.25, "speed_of": "search"}
    path = str(place.write({"search": JOBS["search"], "timed": timed}))
    assert main([path, "--only", "timed"]) == 0
    assert place.calls() == ["search-lr-0.1", "search-lr-0.01", "search-lr-10", "timed"]


def test_only_what_is_asked_for_and_what_it_needs(place: Place) -> None:
    path = str(place.write(JOBS))
    assert main([path, "--only", "timed"]) == 0
    assert place.calls() == ["search-lr-0.1", "search-lr-0.01", "search-lr-10", "base-seed-1", "timed"]
    assert main([path, "--only", "look", "tasks"]) == 0
    assert place.calls() == ["command", "tasks"]  # as they were named, not as the YAML has them
    assert main([path, "--only", "tims"]) == 2
    with pytest.raises(SystemExit):
        main([path, "--slots", "0"])
    assert main([path, "--slots", "1", "--list", "title=changes may follow the options"]) == 0


def test_a_failing_run_loses_itself_and_what_needs_it(
    place: Place, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = str(place.write(JOBS))
    (place.folder / "fail").write_text("base-seed-1")
    assert main([path]) == 1
    assert "blocked" in capsys.readouterr().out
    assert "base-seed-1: exit code 1: this run fails" in caplog.text
    assert place.result("base-seed-2")["study"]["outcome"] == "finished"
    assert not (place.folder / "results/s/tasks.json").exists()
    (place.folder / "fail").unlink()
    place.calls()
    assert main([path]) == 0
    assert place.calls() == ["base-seed-1", "timed", "on", "tasks", "command"]


def test_a_search_without_a_result_blocks_what_takes_its_best(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    search = {**JOBS["search"], "grid": {"optimizer.lr": [10, 20]}}
    path = str(place.write({"search": search, "base": JOBS["base"], "other": {"pretrain": "recipe.yaml"}}))
    for calls in (["search-lr-10", "search-lr-20", "other"], []):  # the second time too
        assert main([path]) == 1
        assert place.calls() == calls
    assert "base-seed-1: no run of search has an evaluation loss" in " ".join(caplog.text.split())


def test_when_the_time_is_over_runs_stop_with_what_they_have_and_go_on(place: Place) -> None:
    path = str(place.write({"long": {"pretrain": "recipe.yaml", "set": {"max_duration": "40ba"}}}))
    (place.folder / "slow").touch()
    assert main([path, "--minutes", "0.02"]) == 75
    part = place.result("long")
    assert part["study"]["outcome"] == "unfinished" and 0 < part["steps"] < 40
    assert part["train"]["step"][-1] == part["steps"]
    (place.folder / "slow").unlink()
    assert main([path]) == 0
    whole = place.result("long")
    assert whole["study"]["outcome"] == "finished" and whole["steps"] == 40
    assert whole["train"]["step"] == list(range(1, 41))


def test_runs_end_with_their_study(place: Place) -> None:
    path = place.write({"long": {"pretrain": "recipe.yaml", "set": {"max_duration": "2000ba"}}})
    (place.folder / "slow").touch()
    command = [sys.executable, "-m", "bert.study", str(path)]
    study = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while not (found := list(place.folder.glob("runs/s-long-*/metrics.jsonl"))):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    metrics = found[0]
    study.send_signal(signal.SIGKILL)
    study.wait(30)
    time.sleep(0.5)
    lines = len(metrics.read_text().splitlines())
    time.sleep(0.5)
    assert len(metrics.read_text().splitlines()) == lines < 2000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": {"pretrain": "recipe.yaml", "seed": 3}}, r"unknown key 'jobs.base.seed': did you mean 'seeds'"),
        ({"base": {"pretrain": "recipe.yaml", "glue": "glue.yaml"}}, "give one of pretrain, glue, command, not 2"),
        ({"base": {"glue": "glue.yaml", "grid": {"epochs": [1]}}}, "'grid' is for pretrain, not for glue"),
        ({"base": {"pretrain": "recipe.yaml", "best_of": "serach"}}, "there is no job 'serach': did you mean 'search'"),
        ({"base": {"pretrain": "recipe.yaml", "best_of": "tasks"}}, "best_of 'tasks', which has no grid"),
        ({"base": {"pretrain": "recipe.yaml", "minutes": 3}}, "'minutes' and 'speed_of' go together"),
        (
            {"base": {"pretrain": "recipe.yaml", "needs": ["tasks"]}},
            "jobs wait for each other: base, timed, on, tasks, look",
        ),
        ({"look": {"command": ["look.py"], "checkpoint": "tasks"}}, "fine-tuning leaves none to start from"),
        ({"on": {**JOBS["on"], "checkpoint_seed": 3}}, r"3 is none of the seeds of 'base': \[1, 2\]"),
        ({"base": {**JOBS["base"], "checkpoint_seed": 1}}, "'checkpoint_seed' without a checkpoint"),
        ({"search": {**JOBS["search"], "grid": {"optimizer.lr": []}}}, "grid: 'optimizer.lr' has no values"),
        ({"base": {**JOBS["base"], "seeds": [1, 1]}}, "base-seed-1, or its result"),
        ({"base-seed-1": JOBS["on"]}, "base-seed-1, or its result base-seed-1.json, is taken"),
        ({"study": JOBS["on"]}, "study.json, is taken"),
        ({"look": {**JOBS["look"], "output": "on.json"}}, "its result on.json, is taken"),
    ],
)
def test_mistakes_in_a_study_are_named(place: Place, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_study(place.write({**JOBS, **changes}))


def test_mistakes_in_recipes_come_before_the_first_run(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    for jobs, message in (
        ({**JOBS, "timed": {"pretrain": "recipe.yaml", "set": {"optimizer.rl": 1}}}, "did you mean 'lr'"),
        ({**JOBS, "tasks": {"glue": "glu.yaml", "checkpoint": "base"}}, "did you mean"),
        ({"look": {"command": ["look.py", "{output}"]}}, "its command says {output}, and the job has none"),
    ):
        assert main([str(place.write(jobs))]) == 2
        assert message in capsys.readouterr().err
    assert place.calls() == []


@pytest.mark.parametrize("path", sorted((ROOT / "yamls/studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_here_fit_together(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_study(path, [f"results={tmp_path}"])
    assert config.name == path.stem
    study = Study(config)  # reads every recipe
    assert len(study.runs) > 5 and all(progress.state == "waiting" for progress in study.runs.values())


def test_names_of_runs(place: Place) -> None:
    grid = {"model.config.hyena_w": [10, 1], "initialization": ["legacy"]}
    study = load_study(place.write({"a": {"pretrain": "recipe.yaml", "grid": grid, "seeds": [7]}}))
    assert [run.name for run in runs_of(study)] == [
        "a-hyena_w-10-initialization-legacy",
        "a-hyena_w-1-initialization-legacy",
    ]


def test_curves_are_means_of_their_parts() -> None:
    lines: list[dict[str, Any]] = [
        {"event": "train", "batch": i, "token": 10 * i, "loss/train/total": float(i), "time/train": i / 60}
        for i in range(1, 601)
    ]
    lines.insert(300, {"event": "eval", "batch": 300, "token": 3000, "metrics/eval/MaskedCrossEntropy": 2.5})
    found = curves(lines)
    assert len(found["train"]["loss"]) == 300
    assert found["train"]["loss"][:2] == [1.5, 3.5] and found["train"]["step"][-1] == 600
    assert found["evaluation"] == {
        "step": [300],
        "tokens": [3000],
        "minutes": [300.0],
        "loss": [2.5],
        "accuracy": [None],
    }
    assert (found["steps"], found["tokens"], found["minutes"], found["mfu"]) == (600, 6000, 600.0, None)


def test_a_torn_last_line_is_left_out_and_another_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = json.dumps({"event": "train", "batch": 1, "token": 1})
    path.write_text(good + "\n" + good[:9])
    assert len(read_metrics(path)) == 1
    path.write_text(good[:9] + "\n" + good + "\n")
    with pytest.raises(DataError, match="line 1 is no line of metrics"):
        read_metrics(path)
    with pytest.raises(DataError, match="logger jsonl"):
        read_metrics(tmp_path / "none")
