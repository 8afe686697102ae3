"""CUDA graphs of training steps: which are captured, and on a GPU that they compute what the kernels do one by one."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import RobertaConfig, RobertaForSequenceClassification

from bert.glue import job as jobs
from bert.glue.graphs import EAGER_STEPS, TrainingGraphs, _distinct, _replayed, graphs_apply
from bert.glue.model import SequenceClassifier, build_classifier
from bert.glue.schema import Settings
from tests.bert.glue.conftest import MODEL, Recipe
from tests.bert.glue.test_sweep import specification

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
MODELS = ("m2_bert", "attention_bert", "hf_bert")
NAMES = ("input_ids", "attention_mask", "token_type_ids")
SETTINGS = Settings(optimizer={"name": "adamw"}, scheduler={"name": "constant_with_warmup"})


def classifier(name: str = "m2_bert", dropout: float = 0.0) -> SequenceClassifier:
    torch.manual_seed(0)
    config: dict[str, Any] = {key: value for key, value in MODEL.items() if name == "m2_bert" or "hyena" not in key}
    config |= {
        "hidden_size": 64,
        "intermediate_size": 256,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": 0.0,
        "num_attention_heads": 2,
    }
    if name == "hf_bert":
        config.pop("long_conv_l_max")
    else:
        config |= {"mask_padding": True, "initialization": "per_layer"}
    return build_classifier(name, config, num_labels=3, pooling="first").train()


def batch_of(length: int, rows: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 18, (rows, length), generator=generator)
    mask = (torch.arange(length) < torch.randint(2, length + 1, (rows, 1), generator=generator)).long()
    labels = torch.randint(0, 3, (rows,), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2, "labels": labels}


class Recorder:
    """Stands for the capture of a graph: says what was captured, and how often each is replayed."""

    def __init__(self, full_at: int | None = None) -> None:
        self.captured: list[tuple[int, ...]] = []
        self.replayed: list[int] = []
        self.full_at = full_at

    def __call__(self, run: Any, inputs: tuple[torch.Tensor, ...]) -> Any:
        if len(self.captured) == self.full_at:
            return None
        self.captured.append(tuple(inputs[0].shape))

        def replay(*inputs: torch.Tensor) -> torch.Tensor:
            self.replayed.append(inputs[0].shape[1])
            return run(*inputs)

        return replay


def test_a_shape_is_captured_once_and_only_if_it_comes_again() -> None:
    model, recorder = classifier(), Recorder()
    model.training_pass = TrainingGraphs(model.model, model.inputs, recorder)
    for length in (8, 12, 8, 8, 12, 8, 12, 12, 16):
        batch = batch_of(length)
        expected = model.model(**{name: batch[name] for name in NAMES}).logits
        torch.testing.assert_close(model(batch), expected, rtol=0, atol=0)
    assert EAGER_STEPS == 2
    assert recorder.captured == [(4, 8), (4, 12)]
    assert recorder.replayed == [8, 8, 12, 12]


def test_evaluation_is_never_a_replay() -> None:
    model, recorder = classifier(), Recorder()
    model.training_pass = TrainingGraphs(model.model, model.inputs, recorder)
    for _ in range(EAGER_STEPS + 1):
        model(batch_of(8))
    assert recorder.replayed == [8]
    with torch.no_grad():
        model(batch_of(8))
    model.eval()
    for _ in range(3):
        model.eval_forward(batch_of(8))
    assert recorder.replayed == [8]


def test_what_does_not_fit_is_trained_without(caplog: pytest.LogCaptureFixture) -> None:
    model, recorder = classifier(), Recorder(full_at=1)
    model.training_pass = TrainingGraphs(model.model, model.inputs, recorder)
    with caplog.at_level(logging.WARNING):
        for length in (8, 8, 8, 12, 12, 12, 12, 16, 16, 16, 8):
            assert model(batch_of(length)).shape == (4, 3)
    assert (recorder.captured, recorder.replayed) == ([(4, 8)], [8, 8])
    assert [record.message for record in caplog.records] == [
        "further shapes are trained without CUDA graphs, which is slower: the GPU's memory is short"
    ]


def test_a_replay_has_the_gradients_of_what_was_captured() -> None:
    """With functions in the place of CUDA's graphs: they read and write the same memory each time."""

    def capture(run: Any, inputs: tuple[torch.Tensor, ...]) -> Any:
        places = tuple(tensor.clone() for tensor in inputs)
        weights = dict(run.model.named_parameters())
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        outputs = run(*places, weights=leaves)
        grad, static = torch.zeros_like(outputs), outputs.detach().clone()
        gradients = tuple(torch.zeros_like(weight) for weight in weights.values())

        def forward() -> None:
            static.copy_(run(*places, weights=leaves).detach())

        @torch.enable_grad()
        def backward() -> None:
            found = torch.autograd.grad(run(*places, weights=leaves), [*leaves.values()], grad)
            for place, gradient in zip(gradients, found, strict=True):
                place.copy_(gradient)

        first: Any = SimpleNamespace(replay=forward)
        second: Any = SimpleNamespace(replay=backward)
        return _replayed(first, second, places, static, grad, gradients, tuple(weights.values()))

    model, plain = classifier(), classifier()
    model.training_pass = graphs = TrainingGraphs(model.model, model.inputs, capture)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, plain)]
    for step in range(EAGER_STEPS + 4):
        batch = batch_of(8, seed=step)
        for each, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            each.loss(each(batch), batch).backward()
            optimizer.step()
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
            torch.testing.assert_close(ours, theirs, msg=name)
    assert len(graphs._graphs) == 1


def test_gradients_that_are_one_tensor_become_several() -> None:
    one, other = torch.ones(2), torch.zeros(2)
    first, none, second, third = _distinct([one, None, other, one])
    assert none is None and first is one and second is other
    assert third is not None and third.data_ptr() != one.data_ptr() and torch.equal(third, one)


def test_a_failed_capture_says_what_to_do() -> None:
    def fails(run: Any, inputs: tuple[torch.Tensor, ...]) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore about it")

    model = classifier()
    model.training_pass = TrainingGraphs(model.model, model.inputs, fails)
    for _ in range(EAGER_STEPS):
        model(batch_of(8))
    with pytest.raises(RuntimeError, match=r"could not be captured, set cuda_graphs=false: CUDA out of memory\.$"):
        model(batch_of(8))


@pytest.mark.parametrize(
    ("changes", "applies"),
    [
        ({}, True),
        ({"microbatch_size": 32}, True),
        ({"algorithms": {"gradient_clipping": {}, "ema": None}}, True),
        ({"microbatch_size": 16}, False),
        ({"algorithms": {"ema": {}}}, False),
        ({"callbacks": {"activation_monitor": {}}}, False),
        ({"compile": True}, False),
    ],
)
def test_whose_steps_are_captured(changes: dict[str, Any], applies: bool) -> None:
    assert graphs_apply(classifier().model, dataclasses.replace(SETTINGS, **changes)) is applies


def test_the_models_whose_steps_are_captured() -> None:
    for name in ("attention_bert", "hf_bert"):
        assert graphs_apply(classifier(name).model, SETTINGS)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    other = RobertaForSequenceClassification(RobertaConfig(vocab_size=20, **small))
    assert not graphs_apply(other, SETTINGS)


class NoLooking(TorchDispatchMode):
    """Refuses what on a GPU would wait for the device: a value of a tensor on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            raise AssertionError("a value of a tensor was asked for")
        return func(*args, **(kwargs or {}))


def test_hugging_faces_bert_runs_without_looking_at_its_mask() -> None:
    model = classifier("hf_bert")
    batch = batch_of(8)
    inputs = {name: batch[name] for name in NAMES}
    with pytest.raises(AssertionError, match="value of a tensor"), NoLooking():
        model.model(**inputs)
    model.training_pass = TrainingGraphs(model.model, model.inputs, Recorder())
    with NoLooking():
        logits = model(batch)
    torch.testing.assert_close(logits, model.model(**inputs).logits)
    logits.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.model(**inputs).logits.sum().backward()
    for found, expected in zip(gradients, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_gpu) for name in MODELS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replays_compute_what_kernels_do(name: str, dtype: torch.dtype) -> None:
    model, plain = classifier(name).cuda(), classifier(name).cuda()
    model.training_pass = graphs = TrainingGraphs(model.model, model.inputs)
    rate = 0.1
    for step, length in enumerate((8, 8, 16, 8, 16, 16, 8, 16, 8)):
        batch = {key: value.cuda() for key, value in batch_of(length, seed=step).items()}
        losses = []
        for each in (model, plain):
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                loss = each.loss(each(batch), batch)
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5 if dtype == torch.float32 else 1e-2), step
        for (key, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert (ours.grad is None) is (theirs.grad is None), key
            if theirs.grad is None:
                continue
            assert ours.grad is not None
            scale = max(theirs.grad.norm().item(), 1e-3)
            assert (ours.grad - theirs.grad).norm() <= (1e-4 if dtype == torch.float32 else 3e-2) * scale, key
        with torch.no_grad():  # the same weights again, so that differences do not add up
            for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
                if theirs.grad is not None:
                    theirs.sub_(rate * theirs.grad)
                    ours.copy_(theirs)
                    ours.grad = theirs.grad = None
    assert len(graphs._graphs) == 2


@pytest.mark.parametrize("place", [pytest.param("cuda", marks=needs_gpu)])
def test_dropout_draws_anew_in_every_replay(place: str) -> None:
    model = classifier(dropout=0.5).to(place)
    model.training_pass = TrainingGraphs(model.model, model.inputs)
    batch = {key: value.to(place) for key, value in batch_of(8).items()}
    outputs = []
    for _ in range(EAGER_STEPS + 3):
        logits = model(batch)
        outputs.append(logits.detach().clone())
        logits.sum().backward()
    replayed = outputs[EAGER_STEPS:]
    assert not any(torch.equal(a, b) for i, a in enumerate(replayed) for b in replayed[:i])


@pytest.mark.parametrize("device", [pytest.param("gpu", marks=needs_gpu)])
def test_a_job_trains_with_them(
    device: str, recipe: Recipe, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    captured: list[Any] = []

    class Watched(TrainingGraphs):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            captured.append(self._graphs)

    monkeypatch.setattr(jobs, "TrainingGraphs", Watched)
    path = recipe(
        tasks={"stsb": {}}, seeds=[5], epochs=3, precision="amp_bf16", optimizer={"name": "adamw", "lr": 1e-2}
    )
    spec = dataclasses.replace(specification(path, f"device={device}"), device=device)
    Path(spec.folder).mkdir(parents=True, exist_ok=True)
    result = jobs.train(spec)
    assert result["steps"] == 15
    assert captured[0], "nothing was captured"
    assert "without CUDA graphs" not in caplog.text
