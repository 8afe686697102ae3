"""Every YAML of yamls/pretrain is a recipe that builds, with the paper's sizes and settings."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bert.composer_models import count_parameters
from bert.errors import RecipeError
from bert.recipe import builders, dry_run
from bert.recipe.schema import TrainConfig, load_config
from bert.recipe.train import main

FOLDER = Path(__file__).parents[3] / "yamls" / "pretrain"
PARAMETERS = {  # of the original code; the last follow from it and from the demos' sizes
    "m2-base": 80_267_328,
    "m2-base-plus": 80_267_328,
    "m2-base-960": 115_583_616,
    "m2-large-260m": 259_133_760,
    "m2-large-341m": 341_038_144,
    "m2-base-2k": 81_972_288,
    "bert-base": 109_088_832,
    "hf-bert-base": 109_514_298,
    "m2-base-8k": 87_428_160,
    "m2-demo": 1_841_536,
    "bert-demo": 1_336_704,
    "m2-base-2k-continue": 81_972_288,
    "m2-base-8k-continue": 87_428_160,
}
CONTINUED = {"m2-base-2k-continue": 256 * 2048, "m2-base-8k-continue": 64 * 8192}
PAPER = sorted(set(PARAMETERS) - {"m2-demo", "bert-demo", "m2-base-plus"} - set(CONTINUED))


def load(name: str) -> TrainConfig:
    return load_config(FOLDER / f"{name}.yaml")


def test_no_recipe_is_missing_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_recipe_builds(name: str) -> None:
    config = load(name)
    builders.check_config(config)
    assert config.run_name == name
    with torch.device("meta"):
        model = builders.build_model(config)
    assert count_parameters(model) == PARAMETERS[name]
    optimizer = builders.build_optimizer(config, model)
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(list(model.parameters()))]
    builders.build_scheduler(config)
    builders.build_algorithms(config)
    assert "NaNGuard" in [type(callback).__name__ for callback in builders.build_callbacks(config, {})]
    assert [type(logger).__name__ for logger in builders.build_loggers(config, {})] == ["JsonlLogger"]


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_settings(name: str) -> None:
    config = load(name)
    m2 = name.startswith("m2")
    assert config.optimizer == {
        "name": "decoupled_adamw",
        "lr": 8e-4 if m2 else 5e-4,
        "betas": [0.9, 0.98],
        "eps": 1e-6,
        "weight_decay": 1e-5,
    }
    assert config.scheduler == {"name": "linear_decay_with_warmup", "t_warmup": "0.06dur", "alpha_f": 0.02}
    assert config.train_loader.dataset.mlm_probability == (0.15 if name == "hf-bert-base" else 0.3)
    assert config.eval_loader is not None and config.eval_loader.dataset.mlm_probability == 0.15
    clipping = {"gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0}}
    assert config.algorithms == (clipping if m2 else {})
    assert (config.precision, config.seed) == ("amp_bf16", 17)
    if m2:
        assert config.model.config["initialization"] == "legacy"
    result = dry_run.estimate(config)
    assert (result.tokens_per_step, result.steps) == (4096 * 128, 70_000)


@pytest.mark.parametrize("name", CONTINUED)
def test_longer_context_goes_on_from_weights_with_a_mix_of_lengths(name: str) -> None:
    config = load(name)
    assert config.load_weights_only and config.load_path is not None and str(config.max_seq_len) in config.load_path
    assert config.model.config["mask_padding"] and config.train_loader.pad_to_longest
    streams = config.train_loader.dataset.streams
    assert sum(stream.proportion or 0 for stream in streams.values()) == pytest.approx(1)
    assert config.train_loader.dataset.local is None and config.train_loader.dataset.batching_method == "per_stream"
    assert config.eval_loader is not None and config.eval_loader.dataset.local == config.data_local
    result = dry_run.estimate(config)
    assert (result.tokens_per_step, result.steps) == (CONTINUED[name], 6000)


def test_dry_run_prints_the_size_without_data(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["dry_run=true", "dry_run_num_devices=8", "dry_run_mfu=0.5", "data_local=nowhere"]
    assert main([str(FOLDER / "m2-base.yaml"), *overrides]) == 0
    text = capsys.readouterr().out
    for part in ("80,267,328 parameters", "524,288 tokens", "70,000 steps", "3.67e+10 tokens", "8 x h200-sxm at 50%"):
        assert part in text


def test_the_estimate_is_arithmetic() -> None:
    base = dry_run.estimate(load_config(FOLDER / "m2-base.yaml"))
    flops = 3 * base.forward_flops_per_token * 4096 * 128 * 70_000
    assert base.training_flops == pytest.approx(flops)
    assert base.seconds == pytest.approx(flops / (1.979e15 / 2 * 0.3))
    assert (base.reduction_bytes, base.efficiency) == (0, 1)
    halved = dry_run.estimate(
        load_config(FOLDER / "m2-base.yaml", ["dry_run_num_devices=2", "dry_run_device=a100", "max_duration=10ba"])
    )
    assert halved.compute_s == pytest.approx(flops / 70_000 / (312e12 * 0.3 * 2))
    assert halved.reduction_bytes == 4 * 80_267_328
    assert halved.seconds == pytest.approx(10 * (halved.compute_s + halved.reduction_bytes / 300e9))
    tokens = dry_run.estimate(load_config(FOLDER / "m2-base.yaml", ["max_duration=524289tok"]))
    assert tokens.steps == 2


def test_the_estimate_for_several_nodes() -> None:
    nodes = ["dry_run_num_devices=16", "dry_run_network_bandwidth=25", "dry_run_overhead_ms=2", "dry_run_price=3"]
    config = load_config(FOLDER / "m2-base.yaml", [*nodes, "gradient_reduction=bf16"])
    result = dry_run.estimate(config)
    assert result.reduction_bytes == pytest.approx(2 * 80_267_328 * 2 * 15 / 16)
    step = result.compute_s + result.reduction_bytes / 25e9 + 2e-3
    assert result.seconds == pytest.approx(70_000 * step)
    assert result.efficiency == pytest.approx(result.compute_s / step)
    hours = 16 * result.seconds / 3600
    assert f"{3 * hours:,.0f} for {hours:,.0f} device hours" in dry_run.report(config)
    one_node = dry_run.estimate(load_config(FOLDER / "m2-base.yaml", [*nodes, "dry_run_devices_per_node=16"]))
    assert one_node.reduction_s == pytest.approx(2 * result.reduction_bytes / 300e9)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dry_run_device=h20", "did you mean 'h200-sxm'?"),
        ("max_duration=2ep", "a dry run reads no data"),
        ("dry_run_device=v100-sxm", "precision amp_bf16: no peak speed is known for v100-sxm"),
    ],
)
def test_what_a_dry_run_cannot_know(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        dry_run.estimate(load_config(FOLDER / "m2-base.yaml", [override]))


def test_model_keys_are_checked_when_the_model_is_built(recipe: Callable[..., Path]) -> None:
    config = load_config(recipe(), ["model.config.hiden_size=8"])
    with torch.device("meta"), pytest.raises(RecipeError, match=r"hiden_size.*did you mean 'hidden_size'"):
        builders.build_model(config)
