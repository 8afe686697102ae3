"""Names and arguments of a recipe are checked before anything is built, with the nearest name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from composer.algorithms import GradientClipping
from composer.callbacks import EarlyStopper
from composer.core import State, Time, Timestamp
from composer.optim import DecoupledAdamW

from bert.errors import RecipeError
from bert.recipe import builders
from bert.recipe.builders import REGISTRY, Entry, check_arguments, check_config
from bert.recipe.schema import load_config

Recipe = Callable[..., Path]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.name=m2bert", "model.name: unknown name 'm2bert': did you mean 'm2_bert'?"),
        ("optimizer.name=decoupled_adam", "unknown name 'decoupled_adam': did you mean 'decoupled_adamw'?"),
        (
            "optimizer.weight_decy=0",
            "optimizer.decoupled_adamw: unknown key 'weight_decy': did you mean 'weight_decay'?",
        ),
        ("optimizer.lr=fast", "optimizer.decoupled_adamw.lr must be float, not 'fast'"),
        ("optimizer.params=[]", "unknown key 'params'"),
        ("optimizer.param_groups=[{lr: 1.0}]", "optimizer.param_groups[0] must be a section with a 'pattern'"),
        ("scheduler.alpha_ff=0", "did you mean 'alpha_f'?"),
        ("scheduler.t_warmup=null", "scheduler.linear_decay_with_warmup needs t_warmup"),
        ("scheduler.name=null", "scheduler: unknown name 'None'"),
        ("scheduler.name=constant_with_warmup", "scheduler.constant_with_warmup: unknown key 'alpha_f'"),
        ("algorithms.gradient_cliping={}", "algorithms: unknown name 'gradient_cliping'"),
        ("algorithms.gradient_clipping.clipping_norm=1", "unknown key 'clipping_norm'"),
        ("callbacks.lr_monitor=true", "callbacks.lr_monitor must be a section"),
        ("callbacks.lr_monitor={window: 3}", "callbacks.lr_monitor: unknown key 'window': it has none"),
        ("callbacks.speed_monitor={window_size: big}", "callbacks.speed_monitor.window_size must be int, not 'big'"),
        ("loggers.wandbb={}", "did you mean 'wandb'?"),
        ("max_duration=10", "max_duration: Invalid time string"),
        ("save_interval=often", "save_interval: Invalid time string"),
        ("precision=bf16", "precision 'bf16': did you mean 'amp_bf16'?"),
        ("device=cuda", "device 'cuda'"),
        ("python_log_level=verbose", "python_log_level 'verbose'"),
        ("device_train_microbatch_size=atuo", "did you mean 'auto'?"),
        ("device_train_microbatch_size=0", "device_train_microbatch_size must be positive"),
        ("global_train_batch_size=-4", "global_train_batch_size must be positive"),
        ("mlm_probability=1.5", "mlm_probability must lie between 0 and 1"),
        ("max_seq_len=17", "model.config.max_position_embeddings is 16, shorter than max_seq_len 17"),
        ("compile={fulgraph: true}", "compile: unknown key 'fulgraph': did you mean 'fullgraph'?"),
        ("compile=3", "compile must be a section"),
        ("parallelism_config={fsdpp: {}}", "parallelism_config: unknown key 'fsdpp': did you mean 'fsdp'?"),
        ("parallelism_config={fsdp: {sharding: x}}", "did you mean 'sharding_strategy'?"),
    ],
)
def test_mistakes_name_key_and_remedy(recipe: Recipe, override: str, message: str) -> None:
    config = load_config(recipe(), [override])
    with pytest.raises(RecipeError, match=re.escape(message)):
        check_config(config)


def test_autoresume_needs_a_folder(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="autoresume=true needs a save_folder"):
        check_config(load_config(recipe(), ["autoresume=true", "save_folder=null"]))


def test_what_is_right_passes(recipe: Recipe) -> None:
    overrides = [
        "scheduler.alpha_f=null",
        "compile={mode: max-autotune, fullgraph: true}",
        "parallelism_config={fsdp: {sharding_strategy: FULL_SHARD, mixed_precision: PURE}}",
        "callbacks.optimizer_monitor={log_optimizer_metrics: false}",
        "callbacks.lr_monitor=null",
        "optimizer.param_groups=[{pattern: filter, lr: 1}]",
        "scheduler={name: warmup_stable_decay, t_warmup: 0.1dur, t_decay: 2ba}",
        "optimizer.eps=null",
    ]
    config = load_config(recipe(), overrides)
    check_config(config)
    assert "lr_monitor" not in [type(c).__name__ for c in builders.build_callbacks(config, {})]
    assert (
        builders.build_scheduler(config)(
            cast(State, SimpleNamespace(max_duration=Time(9, "ba"), timestamp=Timestamp(batch=9)))
        )
        == 0
    )
    assert builders.compile_arguments(config) == {"mode": "max-autotune", "fullgraph": True}


@pytest.mark.parametrize("kind", sorted(REGISTRY))
def test_every_registered_builder_refuses_an_unknown_argument(kind: str) -> None:
    for name, entry in REGISTRY[kind].items():
        with pytest.raises(RecipeError, match=rf"{name}: unknown key 'not_an_argument'"):
            check_arguments(name, entry.build, {"not_an_argument": 1})


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY["loggers"], "wandb", Entry(dict, ("package_that_nobody_has",), "wandb"))
    with pytest.raises(RecipeError, match=r"loggers\.wandb needs package_that_nobody_has: pip install wandb"):
        builders.build("loggers", "wandb", {})


def test_values_that_are_refused_name_the_builder() -> None:
    with pytest.raises(RecipeError, match=r"callbacks\.speed_monitor: Invalid time_unit"):
        builders.build("callbacks", "speed_monitor", {"time_unit": "fortnights"})


def test_build_hands_arguments_over(recipe: Recipe) -> None:
    clipping = builders.build("algorithms", "gradient_clipping", {"clipping_type": "norm", "clipping_threshold": 0.5})
    assert isinstance(clipping, GradientClipping) and clipping.clipping_threshold == 0.5
    stopper = builders.build(
        "callbacks", "early_stopper", {"monitor": "MaskedCrossEntropy", "dataloader_label": "eval", "patience": "4ba"}
    )
    assert isinstance(stopper, EarlyStopper)
    model = torch.nn.Linear(2, 2)
    optimizer = builders.build_optimizer(load_config(recipe()), model)
    assert isinstance(optimizer, DecoupledAdamW)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]
    assert optimizer.param_groups[0]["lr"] == 1e-2 and list(optimizer.param_groups[0]["betas"]) == [0.9, 0.98]


@pytest.mark.parametrize(
    ("compile_", "graphs"),
    [
        ("compile=true", False),
        ("compile={mode: reduce-overhead}", True),
        ("compile={mode: max-autotune-no-cudagraphs}", False),
        ("compile={options: {triton.cudagraphs: true}}", True),
        ("compile=false", False),
    ],
)
def test_which_compilation_has_cuda_graphs(recipe: Recipe, compile_: str, graphs: bool) -> None:
    assert builders.uses_cuda_graphs(load_config(recipe(), [compile_])) is graphs


@pytest.mark.parametrize(
    ("overrides", "expected", "reason"),
    [
        ([], builders.COMPILE_ON_GPU, ""),
        (["device_train_microbatch_size=auto"], False, "auto: each size"),
        (["parallelism_config={fsdp: {}}"], False, "sharded"),
        (["train_loader.pad_to_longest=true"], False, "width"),
        (["task=contrastive"], False, "width"),
        (["overlap_reduction=true"], True, "cuts"),
    ],
)
def test_what_compile_auto_is_on_a_gpu(recipe: Recipe, overrides: list[str], expected: object, reason: str) -> None:
    config = load_config(recipe(), ["compile=auto", "device_train_microbatch_size=4", *overrides])
    found, why = builders.resolved_compile(config, on_gpu=True)
    assert found == expected and reason in why
    assert builders.resolved_compile(config, on_gpu=False)[0] is False
    explicit = load_config(recipe(), ["compile={fullgraph: true}", *overrides])
    assert builders.resolved_compile(explicit, on_gpu=True) == ({"fullgraph": True}, "")


def test_cuda_graphs_need_a_fixed_microbatch(recipe: Recipe) -> None:
    graphs = ["compile={mode: reduce-overhead}"]
    check_config(load_config(recipe(), [*graphs, "device_train_microbatch_size=4"]))
    with pytest.raises(RecipeError, match="needs a number"):
        check_config(load_config(recipe(), [*graphs, "device_train_microbatch_size=auto"]))


@pytest.mark.parametrize(("warmup", "duration"), [("2dur", "10ba"), ("1dur", "10ba"), ("10ba", "10ba"), ("9sp", "8sp")])
def test_a_warm_up_that_takes_the_whole_run_is_refused(warmup: str, duration: str) -> None:
    overrides = [f"scheduler.t_warmup={warmup}", f"max_duration={duration}"]
    with pytest.raises(RecipeError, match=f"t_warmup: {warmup} is no less than"):
        check_config(load_config("yamls/pretrain/m2-base.yaml", overrides))
    overrides = [f"scheduler.t_warmup={warmup}", f"scheduler.t_max={duration}", "max_duration=1000ba"]
    with pytest.raises(RecipeError, match=f"t_warmup: {warmup} is no less than"):
        check_config(load_config("yamls/pretrain/m2-base.yaml", overrides))


@pytest.mark.parametrize(
    ("warmup", "duration"), [("0.99dur", "10ba"), ("9ba", "10ba"), ("0ba", "1ba"), ("10ba", "2ep")]
)
def test_a_warm_up_within_the_run_is_not(warmup: str, duration: str) -> None:
    overrides = [f"scheduler.t_warmup={warmup}", f"max_duration={duration}"]
    check_config(load_config("yamls/pretrain/m2-base.yaml", overrides))


@pytest.mark.parametrize("wrong", ["save_interval=0ba", "eval_interval=0ba", "max_duration=-5ba", "max_duration=1dur"])
def test_times_that_never_come_are_refused(wrong: str) -> None:
    with pytest.raises(RecipeError, match=f"{wrong.replace('=', ': ')} is no length of time"):
        check_config(load_config("yamls/pretrain/m2-base.yaml", [wrong]))
