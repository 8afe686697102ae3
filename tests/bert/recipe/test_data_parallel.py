"""Several ranks train as one process does. The ranks of a test are started once, for all that it compares."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from bert.composer_models import MaskedAccuracy, MaskedCrossEntropy
from bert.errors import RecipeError
from bert.recipe.builders import check_config
from bert.recipe.callbacks import GradientBuffers
from bert.recipe.data_parallel import compiled_graphs, set_gradient_reduction
from bert.recipe.schema import load_config
from bert.recipe.train import main

REPOSITORY = Path(__file__).parents[3]
Recipe = Callable[..., Path]

# Each rank runs main.py with one list of arguments after the other.
RANK = """
import json, runpy, sys

script, runs = sys.argv[1:]
for arguments in json.loads(runs):
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""
# Two ranks of one GPU: NCCL refuses them, gloo does not.
SHARED_GPU = """
from composer.devices import DeviceGPU
from bert.recipe import train

DeviceGPU.dist_backend = "gloo"
train.training_device = lambda name: DeviceGPU(device_id=0)
"""


def train_on_two_ranks(folder: Path, runs: list[list[str]], prelude: str = "") -> None:
    script = folder / "rank.py"
    script.write_text(prelude + RANK)
    launcher = [sys.executable, "-m", "composer.cli", "-n", "2"]
    command = [*launcher, str(script), str(REPOSITORY / "main.py"), json.dumps(runs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, timeout=300, env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-4000:]


def logged(folder: Path, event: str = "train") -> list[dict]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [line for line in map(json.loads, text.splitlines()) if line["event"] == event]


def losses(folder: Path) -> list[float]:
    return [line["loss/train/total"] for line in logged(folder)]


@pytest.mark.slow
def test_two_ranks_train_like_one(recipe: Recipe, tmp_path: Path) -> None:
    common = [str(recipe(callbacks={"loader_monitor": {}})), "model.config.hidden_dropout_prob=0.0", "max_duration=6ba"]
    assert main([*common, "run_name=n1"]) == 0
    # One graph, in spite of what wraps the model: its gradients are exchanged at once. Two microbatches a rank.
    graph = ["compile={backend: aot_eager, fullgraph: true}", "device_train_microbatch_size=2", "eval_interval=2ba"]
    runs = [[*common, "run_name=n2"], [*common, "run_name=bf16", "gradient_reduction=bf16"]]
    runs += [[*common, *graph, "run_name=graph"], [*common, *graph, "run_name=graph16", "gradient_reduction=bf16"]]
    train_on_two_ranks(tmp_path, runs)
    names = ("n1", "n2", "bf16", "graph", "graph16")
    one, two, bf16, compiled, compiled16 = (tmp_path / "runs" / name for name in names)
    assert len(losses(compiled)) == 6
    assert losses(compiled) == pytest.approx(losses(one), abs=1e-4)
    assert losses(compiled16) == pytest.approx(losses(bf16), abs=1e-3)
    assert losses(compiled16)[1:] != losses(compiled)[1:]
    assert len(losses(one)) == 6
    assert losses(one) == pytest.approx(losses(two), abs=1e-4)
    for metric in ("MaskedCrossEntropy", "MaskedPerplexity", "MaskedAccuracy"):
        for event in ("train", "eval"):
            values = [logged(folder, event)[-1][f"metrics/{event}/{metric}"] for folder in (one, two)]
            assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert all(line["time/loader_wait"] > 0 for line in logged(two))
    # Rounded gradients: other weights after the first step, but close.
    assert losses(bf16)[0] == pytest.approx(losses(two)[0], abs=1e-6)
    assert losses(bf16)[1:] != losses(two)[1:]
    assert losses(bf16) == pytest.approx(losses(two), abs=5e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_two_ranks_on_gpus_train_like_one(recipe: Recipe, tmp_path: Path) -> None:
    sizes = {"model.config.hidden_size": 64, "model.config.intermediate_size": 128, "global_train_batch_size": 16}
    common = [str(recipe()), "device=gpu", "max_duration=6ba", "model.config.hidden_dropout_prob=0.0"]
    common += [f"{key}={value}" for key, value in sizes.items()]
    assert main([*common, "run_name=n1"]) == 0
    shared = torch.cuda.device_count() < 2
    graphs = ["compile={mode: reduce-overhead}", "device_train_microbatch_size=4", "eval_loader=null"]  # two of them
    runs = [[*common, "run_name=n2"], [*common, "run_name=graphs", *graphs]]
    train_on_two_ranks(tmp_path, runs, SHARED_GPU if shared else "")
    one, two, replayed = (tmp_path / "runs" / name for name in ("n1", "n2", "graphs"))
    assert len(losses(one)) == 6
    assert losses(one) == pytest.approx(losses(two), abs=1e-4)
    assert losses(one) == pytest.approx(losses(replayed), abs=1e-4)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    # Gloo's threads let go of Python callbacks (bf16's) after the reduction is done, and need the interpreter for it,
    # which the group's destructor holds while it waits for them: a deadlock, seen once.
    torch.distributed.barrier()
    time.sleep(0.2)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("reduction", ["fp32", "bf16"])
def test_what_the_ranks_exchange(alone: None, reduction: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 7)
    inputs = torch.randn(3, 5)
    model(inputs).square().sum().backward()
    exact = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    ranks = DistributedDataParallel(model)
    set_gradient_reduction(ranks, reduction)
    with ranks.no_sync():
        ranks(inputs).square().sum().backward()  # a microbatch before the last: nothing is exchanged or rounded
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), exact, strict=True))
    ranks(inputs).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), exact, strict=True):
        expected = 2 * gradient if reduction == "fp32" else (2 * gradient).bfloat16().float()
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", ["fp32", "bf16"])
def test_buffers_are_exchanged_once(alone: None, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last microbatch, all gradients together; by DistributedDataParallel, left as it was, nothing."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 2))
    ranks = DistributedDataParallel(model)
    exchanged: list[torch.dtype] = []
    all_reduce = torch.distributed.all_reduce
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: (exchanged.append(x.dtype), all_reduce(x)))
    ranks.register_comm_hook(None, lambda _, bucket: pytest.fail("DistributedDataParallel reduces"))
    callback, state, logger = GradientBuffers(reduction), SimpleNamespace(model=ranks), Mock()
    for _ in range(2):
        microbatches = torch.randn(2, 3, 5)
        exact = torch.autograd.grad(model(microbatches).square().sum(), list(model.parameters()))
        model.zero_grad(set_to_none=True)
        for microbatch, context in zip(microbatches, (ranks.no_sync, contextlib.nullcontext), strict=True):
            with context():
                callback.before_forward(state, logger)
                ranks(microbatch).square().sum().backward()
                callback.after_backward(state, logger)
        for parameter, gradient in zip(model.parameters(), exact, strict=True):
            tolerance = 1e-6 if reduction == "fp32" else 2**-8
            torch.testing.assert_close(parameter.grad, gradient, rtol=tolerance, atol=1e-5)
        assert ranks.require_backward_grad_sync
    assert exchanged == 2 * [torch.bfloat16 if reduction == "bf16" else torch.float32]
    callback.before_forward(state, logger)  # of a microbatch that an error ends
    callback.before_forward(state, logger)
    model[1].bias.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="replaced within a step"):
        callback.after_backward(state, logger)


def test_metrics_are_gathered(alone: None) -> None:
    outputs = {"cross_entropy_sum": torch.tensor(6.0), "num_masked": torch.tensor(4), "num_correct": torch.tensor(3)}
    for metric, value in ((MaskedCrossEntropy(), 1.5), (MaskedAccuracy(), 0.75)):
        metric.update(outputs)
        assert metric.compute() == value


def test_graphs_are_cut_only_where_asked() -> None:
    before = torch._dynamo.config.optimize_ddp
    for cut in (True, False):
        with compiled_graphs(cut=cut):
            assert torch._dynamo.config.optimize_ddp is cut
    assert torch._dynamo.config.optimize_ddp == before


def test_reduction_is_checked(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="gradient_reduction 'fp8'"):
        check_config(load_config(recipe(), ["gradient_reduction=fp8"]))
    with pytest.raises(RecipeError, match="mixed_precision"):
        check_config(load_config(recipe(), ["gradient_reduction=bf16", "parallelism_config={fsdp: {}}"]))
