"""Fine-tuning YAMLs: resolved, ordered, and every mistake with its key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from bert.composer_models import count_parameters
from bert.errors import RecipeError
from bert.glue.model import build_classifier
from bert.glue.schema import PAPER_ORDER, PAPER_POOLING, check_config, load_config
from bert.glue.sweep import main

from .conftest import Recipe

FOLDER = Path(__file__).parents[3] / "yamls" / "finetune-glue"
# Those of yamls/pretrain less the head for masked words, with pooler (hidden squared + hidden) and classifier.
RECIPES = {"m2-base", "m2-base-960", "m2-large-260m", "m2-large-341m", "bert-base", "hf-bert-base", "m2-base-paper"}


def test_no_recipe_is_missing_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == RECIPES | {"m2-small", "superglue", "any-run", "own-task"}


def test_the_recipe_for_any_run_asks_for_no_other_model_and_gives_all_tasks_one_grid() -> None:
    config = load_config(FOLDER / "any-run.yaml", ["checkpoint=runs/x"])
    plans = check_config(config)
    assert {plan.name for plan in plans} == {"cola", "sst2", "mrpc", "stsb", "rte"}
    assert config.model.name is None and all(plan.start_from is None for plan in plans)
    assert len({str([point for point, _ in plan.points]) for plan in plans}) == 1 and len(plans[0].points) == 3
    assert all(len(plan.seeds) == 3 for plan in plans)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_recipes(name: str) -> None:
    config = load_config(FOLDER / f"{name}.yaml")
    plans = {plan.name: plan for plan in check_config(config)}
    assert plans.keys() == set(PAPER_ORDER)
    assert config.run_name == name
    assert {task for task, plan in plans.items() if plan.start_from == "mnli"} == {"rte", "stsb", "mrpc"}
    seeds = {task: len(plan.seeds) for task, plan in plans.items()}
    assert seeds == {"mnli": 1, "qqp": 1, "qnli": 1, "sst2": 3, "cola": 4, "rte": 5, "stsb": 5, "mrpc": 5}
    assert config.model.name is not None
    with torch.device("meta"):
        model = build_classifier(config.model.name, config.model.config, num_labels=3, pooling="first")
    assert count_parameters(model) > 75_000_000


# lr, weight decay, epochs, optimizer: paper_facts, from the original's yamls/finetune-glue.
PAPER_SETTINGS = {
    "m2-base": {
        "mnli": (5e-5, 5e-6, 3, "decoupled_adamw"),
        "rte": (5e-5, 0.01, 6, "adamw"),
        "qqp": (3e-5, 0.01, 10, "adamw"),
        "qnli": (5e-5, 1e-6, 10, "decoupled_adamw"),
        "sst2": (3e-5, 3e-6, 3, "decoupled_adamw"),
        "stsb": (7e-5, 0.01, 10, "adamw"),
        "mrpc": (5e-5, 0.01, 10, "adamw"),
        "cola": (5e-5, 5e-6, 10, "decoupled_adamw"),
    },
    "m2-base-960": {
        "mnli": (5e-5, 5e-6, 3, "decoupled_adamw"),
        "rte": (1e-5, 1e-6, 3, "decoupled_adamw"),
        "qqp": (3e-5, 3e-6, 5, "decoupled_adamw"),
        "qnli": (5e-5, 1e-6, 10, "decoupled_adamw"),
        "sst2": (3e-5, 3e-6, 3, "decoupled_adamw"),
        "stsb": (8e-5, 3e-6, 10, "decoupled_adamw"),
        "mrpc": (8e-5, 8e-5, 10, "decoupled_adamw"),
        "cola": (8e-5, 5e-6, 10, "adamw"),
    },
    "m2-large-260m": {
        "mnli": (5e-5, 5e-6, 3, "decoupled_adamw"),
        "rte": (1e-5, 1e-6, 3, "decoupled_adamw"),
        "qqp": (3e-5, 3e-6, 5, "decoupled_adamw"),
        "qnli": (5e-5, 1e-6, 10, "decoupled_adamw"),
        "sst2": (3e-5, 3e-6, 3, "decoupled_adamw"),
        "stsb": (7e-5, 3e-6, 10, "decoupled_adamw"),
        "mrpc": (8e-5, 8e-6, 10, "decoupled_adamw"),
        "cola": (5e-5, 5e-6, 10, "decoupled_adamw"),
    },
    "m2-large-341m": {
        "mnli": (5e-5, 5e-6, 3, "decoupled_adamw"),
        "rte": (5e-5, 1e-6, 2, "adamw"),
        "qqp": (3e-5, 3e-6, 5, "decoupled_adamw"),
        "qnli": (5e-5, 1e-6, 10, "decoupled_adamw"),
        "sst2": (3e-5, 3e-6, 3, "decoupled_adamw"),
        "stsb": (8e-5, 3e-6, 8, "decoupled_adamw"),
        "mrpc": (8e-5, 8e-6, 10, "decoupled_adamw"),
        "cola": (5e-5, 1e-6, 10, "decoupled_adamw"),
    },
}
PAPER_SETTINGS["m2-base-paper"] = PAPER_SETTINGS["m2-base"]
BATCH_SIZES = {"mnli": 48, "rte": 16, "qqp": 16, "qnli": 16, "sst2": 16, "stsb": 32, "mrpc": 32, "cola": 32}


@pytest.mark.parametrize("name", PAPER_SETTINGS)
def test_the_papers_settings(name: str) -> None:
    for plan in check_config(load_config(FOLDER / f"{name}.yaml")):
        ((_, settings),) = plan.points
        optimizer = settings.optimizer
        assert (optimizer["lr"], optimizer["weight_decay"], settings.epochs, optimizer["name"]) == PAPER_SETTINGS[name][
            plan.name
        ]
        assert (optimizer["betas"], optimizer["eps"]) == ([0.9, 0.98], 1e-6)
        assert settings.scheduler == {"name": "linear_decay_with_warmup", "t_warmup": "0.06dur", "alpha_f": 0.0}
        assert (settings.batch_size, settings.precision) == (BATCH_SIZES[plan.name], "amp_bf16")


def pooling_as_the_original_leaks_it(order: tuple[str, ...], asks_for_mean: set[str]) -> dict[str, str]:
    """The loop of the original's glue.py: a task's own configuration takes the shared one's place, and stays."""
    main_config, pooling = {"pool_all": False}, {}
    for task in order:
        if task in asks_for_mean:
            main_config = {**main_config, "pool_all": True}
        pooling[task] = "mean" if main_config["pool_all"] else "first"
    return pooling


def test_the_papers_protocol_is_what_the_original_ran() -> None:
    assert pooling_as_the_original_leaks_it(PAPER_ORDER, {"qnli"}) == PAPER_POOLING
    config = load_config(FOLDER / "m2-base-paper.yaml")
    plans = check_config(config)
    assert config.protocol == "paper"
    assert {plan.name: plan.points[0][1].pooling for plan in plans} == PAPER_POOLING
    assert not any(settings.shuffle for plan in plans for _, settings in plan.points)
    # 18 of the 25 jobs pool by the mean, though only QNLI's one asks for it.
    from_mnli = [plan for plan in plans if plan.name in ("rte", "stsb", "mrpc")]
    assert sum(len(plan.seeds) for plan in plans) == 25
    assert sum(len(plan.seeds) for plan in plans if PAPER_POOLING[plan.name] == "mean") == 18
    assert [PAPER_POOLING[plan.name] for plan in from_mnli] == ["first", "mean", "mean"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("shuffle=true", "shuffle is True, but the original ran False"),
        ("tasks.mrpc.task.score=[accuracy]", "tasks.mrpc.task.score is ['accuracy'], but the original ran ['f1']"),
        ("tasks.cola.pooling=first", "tasks.cola.pooling is first, but the original ran mean"),
        ("grid.pooling=[first,mean]", "tasks.mnli.pooling is mean, but the original ran first"),
    ],
)
def test_the_papers_protocol_refuses_to_be_changed(override: str, message: str) -> None:
    if override.startswith("grid"):
        config = load_config(FOLDER / "m2-base-paper.yaml", [override, "only=[mnli]"])
    else:
        config = load_config(FOLDER / "m2-base-paper.yaml", [override])
    with pytest.raises(RecipeError, match=re.escape(message)):
        check_config(config)


def test_a_task_changes_the_shared_settings_and_the_grid_both(recipe: Recipe) -> None:
    tasks = {
        "rte": {"start_from": "mnli", "seeds": [7]},
        "mnli": {"optimizer": {"lr": 0.5}, "epochs": 2},
        "cola": {"grid": {"batch_size": [4, 8]}},
        "stsb": None,
    }
    config = load_config(recipe(tasks=tasks, grid={"optimizer.lr": [0.1, 0.2]}), ["grid.epochs=[3]"])
    plans = {plan.name: plan for plan in check_config(config)}
    assert list(plans) == ["mnli", "rte", "cola"]  # what others start from comes first
    assert plans["rte"].seeds == [7]
    assert [settings.optimizer["lr"] for _, settings in plans["mnli"].points] == [0.1, 0.2]  # the grid goes last
    assert plans["cola"].points[3][0] == {"optimizer.lr": 0.2, "epochs": 3, "batch_size": 8}
    assert (
        len(check_config(load_config(recipe(grid={"optimizer.lr": [1, 2]}), ["grid.optimizer.lr=null"]))[0].points) == 1
    )
    settings = plans["cola"].points[3][1]
    assert (settings.optimizer, settings.epochs) == ({"name": "decoupled_adamw", "lr": 0.2}, 3)
    assert (settings.batch_size, settings.seeds) == (8, [1, 2])


def test_the_example_of_ones_own_task_is_one_task() -> None:
    (plan,) = check_config(load_config(FOLDER / "own-task.yaml", ["checkpoint=somewhere"]))
    assert plan.name == "reviews" and plan.task.num_labels == 2 and len(plan.points) == 2


def test_superglue_is_rows_in_a_yaml() -> None:
    config = load_config(FOLDER / "superglue.yaml", ["checkpoint=somewhere"])
    plans = {plan.name: plan for plan in check_config(config)}
    assert plans.keys() == {"rte", "boolq", "cb", "wic", "wsc", "multirc"}
    assert (plans["cb"].task.num_labels, plans["cb"].task.metrics) == (3, ["accuracy", "f1_macro"])
    assert plans["rte"].task.text == ["premise", "hypothesis"]


def test_a_task_of_ones_own_is_a_row_in_the_yaml(recipe: Recipe) -> None:
    row = {
        "text": ["question", "passage"],
        "labels": ["no", "yes"],
        "metrics": ["accuracy"],
        "source": "hub:super_glue",
    }
    (plan,) = check_config(load_config(recipe(tasks={"boolq": {"task": row, "epochs": 4}})))
    assert (plan.task.text, plan.task.num_labels, plan.points[0][1].epochs) == (["question", "passage"], 2, 4)
    (plan,) = check_config(load_config(recipe(tasks={"cola": {"task": {"metrics": ["accuracy", "matthews"]}}})))
    assert (plan.task.metrics, plan.task.folder) == (["accuracy", "matthews"], "CoLA")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [1]}, "unknown key 'seed': did you mean 'seeds'?"),
        ({"tasks": {"cola": {"epoch": 1}}}, "unknown key 'tasks.cola.epoch': did you mean 'epochs'?"),
        ({"tasks": {"cola": {"epochs": "many"}}}, "tasks.cola: 'epochs'"),
        ({"tasks": {"kola": {}}}, "'kola' is not in the table of tasks: did you mean 'cola'?"),
        (
            {"tasks": {"cola": {"optimizer": {"name": "adamv"}}}},
            "optimizer: unknown name 'adamv': did you mean 'adam'?",
        ),
        ({"tasks": {"cola": {"optimizer": {"rl": 1}}}}, "tasks.cola: optimizer.decoupled_adamw: unknown key 'rl'"),
        ({"tasks": {"cola": {"task": {"colums": 1}}}}, "unknown key 'tasks.cola.task.colums'"),
        ({"tasks": {"cola": {"task": {"metrics": ["pearson"]}}}}, "'pearson' does not go with 2 classes"),
        ({"tasks": {"own": {"task": {"text": ["a"], "metrics": ["f1"]}}}}, "'f1' does not go with a regression"),
        ({"tasks": {"own": {"task": {"text": ["a"], "labels": ["x", "y"]}}}}, "must name at least one of accuracy"),
        ({"tasks": {"cola": {"task": {"diagnostic": "axx"}}}}, "tasks.cola.task.diagnostic 'axx'"),
        ({"tasks": {"cola": {"task": {"diagnostic": "ax"}}}}, "tasks.cola.task.diagnostic 'ax'"),  # of other classes
        ({"tasks": {"cola": 3}}, "tasks.cola must be a section"),
        ({"tasks": {"ax": {}}}, "--test predicts it with the model of mnli"),
        ({"tasks": {"rte": {"start_from": "mnli"}}}, "tasks.rte.start_from: this sweep does not run 'mnli'"),
        ({"tasks": {"rte": {"start_from": "cola"}, "cola": {"start_from": "rte"}}}, "round in a circle"),
        ({"grid": {"optimizer.lr": 1e-3}}, "grid.optimizer.lr must be a list"),
        ({"grid": {"epoch": [1]}}, "unknown key 'tasks.cola.epoch'"),
        ({"grid": {"seeds": [[1]]}}, "'seeds' cannot be a dimension"),
        ({"seeds": [1, 1]}, "seeds must be different numbers"),
        ({"only": ["rte"]}, "only: there is no task 'rte'"),
        ({"tasks": {}}, "there is no task to run"),
        ({"pooling": "max"}, "pooling 'max'"),
        ({"padding": "max"}, "padding 'max'"),
        ({"model": {}}, "give a model (model.name and model.config) or a checkpoint"),
        ({"model": {"name": "m3"}}, "model.name: unknown name 'm3'"),
        ({"eval_interval": "often"}, "eval_interval"),
        ({"num_slots": 0}, "num_slots must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_mistakes_name_their_key(
    recipe: Recipe, changes: dict[str, object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(recipe(**changes))]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_help_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for part in ("usage: python glue.py", "--test", "start_from", "checkpoint", "text: list[str]", "mnli, qqp, qnli"):
        assert part in text
    assert main(["nowhere.yaml"]) == 2
    assert main([]) == 2
