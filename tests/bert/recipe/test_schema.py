"""Recipes are read, inherited, overridden and checked, and every mistake names its key."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from bert.errors import RecipeError
from bert.recipe.builders import check_config
from bert.recipe.schema import load_config, to_yaml

Recipe = Callable[..., Path]


def test_values_types_and_defaults(recipe: Recipe) -> None:
    config = load_config(recipe(), ["optimizer.lr=1e-3", "seed=5", "device_train_microbatch_size=auto", "compile=true"])
    assert config.optimizer["lr"] == 1e-3
    assert config.seed == 5
    assert config.device_train_microbatch_size == "auto"
    assert config.compile is True
    assert config.load_path is None
    assert config.model.config["hidden_size"] == 16


def test_loaders_take_the_recipe_wide_data_settings_unless_they_set_their_own(recipe: Recipe) -> None:
    path = recipe(
        data_local="here",
        data_remote="s3://bucket/text",
        train_loader={"dataset": {"split": "extra", "mlm_probability": 0.4}},
        eval_loader={"dataset": {"streams": {"a": {"local": "there"}}}},
    )
    config = load_config(path)
    assert config.eval_loader is not None
    train, evaluation = config.train_loader.dataset, config.eval_loader.dataset
    assert (train.local, train.remote, train.split, train.mlm_probability) == ("here", "s3://bucket/text", "extra", 0.4)
    assert (evaluation.local, evaluation.split, evaluation.mlm_probability) == (None, "validation", 0.15)
    assert evaluation.streams["a"].local == "there"
    config = load_config(recipe(), ["mlm_probability=0.2", "eval_mlm_probability=0.1"])
    assert config.eval_loader is not None
    assert config.train_loader.dataset.mlm_probability == 0.2
    assert config.eval_loader.dataset.mlm_probability == 0.1


def test_interpolation_and_free_variables(recipe: Recipe) -> None:
    variables = {"width": 24, "nested": {"anything": [1, 2]}}
    config = load_config(recipe(variables=variables), ["model.config.hidden_size=${variables.width}", "max_seq_len=32"])
    assert config.model.config["hidden_size"] == 24
    with pytest.raises(RecipeError, match=r"variables\.heigth"):
        load_config(recipe(variables=variables), ["model.config.hidden_size=${variables.heigth}"])


def test_base_is_inherited_and_null_switches_off(recipe: Recipe, tmp_path: Path) -> None:
    recipe()
    (tmp_path / "sub").mkdir()
    child = tmp_path / "sub" / "child.yaml"
    child.write_text(
        "base: ../tiny.yaml\nrun_name: child\noptimizer: {lr: 0.5}\nalgorithms: {gradient_clipping: null}\n"
    )
    config = load_config(child)
    check_config(config)
    assert (config.run_name, config.optimizer["lr"], config.optimizer["name"]) == ("child", 0.5, "decoupled_adamw")
    assert config.algorithms == {"gradient_clipping": None}
    child.write_text("base: child.yaml\n")
    with pytest.raises(RecipeError, match="inherits itself"):
        load_config(child)


def test_the_resolved_recipe_reads_back_equal(recipe: Recipe, tmp_path: Path) -> None:
    config = load_config(recipe(), ["compile={fullgraph: true}", "eval_loader=null"])
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_duratoin=1ba", "unknown key 'max_duratoin': did you mean 'max_duration'?"),
        ("model.nme=m2_bert", "unknown key 'model.nme': did you mean 'name'?"),
        ("train_loader.num_worker=1", "unknown key 'train_loader.num_worker': did you mean 'num_workers'?"),
        ("train_loader.dataset.shufle=1", "unknown key 'train_loader.dataset.shufle': did you mean 'shuffle'?"),
        (
            "train_loader.dataset.streams.web.locl=x",
            "unknown key 'train_loader.dataset.streams.web.locl': did you mean 'local'?",
        ),
        ("train_loader.dataset.streams.web=3", "'train_loader.dataset.streams.web' must be a section"),
        ("eval_loader.dataset=3", "'eval_loader.dataset' must be a section with keys, not 3"),
        ("model=m2_bert", "'model' must be a section"),
        ("seed=many", "'seed': Value 'many' of type 'str' could not be converted to Integer"),
        ("seed=1.5", "'seed'"),
        ("progress_bar=maybe", "'progress_bar'"),
        ("seed=null", "'seed'"),
        ("device_train_microbatch_size=[1]", "'device_train_microbatch_size'"),
        ("optimizer=3", "'optimizer'"),
    ],
)
def test_unknown_keys_and_wrong_types_name_the_key(recipe: Recipe, override: str, message: str) -> None:
    path = recipe()
    with pytest.raises(RecipeError, match=re.escape(message)) as raised:
        load_config(path, [override])
    assert str(path) in str(raised.value)


def test_a_key_that_must_be_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("seed: 1\n")
    with pytest.raises(RecipeError, match="'run_name'"):
        load_config(path)


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [1\n", "just words", "seed: 1\nseed: 2\n"])
def test_files_that_are_no_recipes(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=r"bad\.yaml"):
        load_config(path)


def test_a_missing_file_names_the_nearest(recipe: Recipe, tmp_path: Path) -> None:
    recipe()
    with pytest.raises(RecipeError, match=r"did you mean '.*tiny\.yaml'"):
        load_config(tmp_path / "tinny.yaml")


def test_a_recipe_that_is_not_there_is_looked_for_by_its_name() -> None:
    for wrong in ("m2-base", "yamls/m2-base.yaml", "yamls/pretrain/m2base.yaml"):
        with pytest.raises(RecipeError, match=r"does not exist: did you mean '.*pretrain/m2-base\.yaml'"):
            load_config(wrong)
