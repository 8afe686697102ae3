"""Batches of pairs, and the contrastive loss: against plain computations, and on two ranks against one."""

from __future__ import annotations

import math
import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel
from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

from bert.configuration import M2BertConfig
from bert.data.tokenizer import train_wordpiece
from bert.embeddings.data import PairCollator, count_pairs, count_tokens
from bert.embeddings.model import ContrastiveAccuracy, ContrastiveCrossEntropy, ContrastiveModel
from bert.modeling import M2BertForMaskedLM

PAIRS = [
    ("the cat", "a cat sat on the mat and on the floor of it"),
    ("a dog", "the dog ran"),
    ("mat", "on the floor the mat is"),
    ("the floor is a floor", "the floor"),
]
LIMIT = 16


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_wordpiece([text for pair in PAIRS for text in pair] * 20, 60)


def new_model(**options: object) -> ContrastiveModel:
    torch.manual_seed(5)
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16}
    lengths = {"max_position_embeddings": LIMIT, "long_conv_l_max": LIMIT}
    settings = {"hyena_w": 1, "initializer_range": 0.3, "mask_padding": True, "hidden_dropout_prob": 0.0}
    network = M2BertForMaskedLM(M2BertConfig(**sizes, **lengths, hyena_filter_order=4, **settings))
    return ContrastiveModel(network, **{"temperature": 0.1, "pooling": "mean", **options})


def batch_of(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    return PairCollator(tokenizer, 6, LIMIT)(pairs)


def test_batches_are_cut_and_padded_each_side_for_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = batch_of(tokenizer, PAIRS)
    for side, name in enumerate(("query", "document")):
        lengths = [min(len(tokenizer(pair[side])["input_ids"]), (6, LIMIT)[side]) for pair in PAIRS]
        ids, mask = batch[f"{name}_ids"], batch[f"{name}_mask"]
        assert ids.shape == mask.shape == (4, max(lengths)) and mask.sum(1).tolist() == lengths
        assert (ids[mask == 0] == tokenizer.pad_token_id).all()
        assert all(row[length - 1] == tokenizer.sep_token_id for row, length in zip(ids, lengths, strict=True))
    assert batch["query_ids"].shape[1] == 6  # the longest query has more
    assert count_pairs(batch) == 4
    assert count_tokens(batch) == {"total": 4 * 6 + batch["document_ids"].numel(), "loss_generating": 4}


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_the_loss_is_that_of_a_plain_computation(tokenizer: PreTrainedTokenizerFast, pooling: str) -> None:
    model = new_model(pooling=pooling, temperature=0.01)
    network = model.model

    def vector(text: str, limit: int) -> list[float]:
        ids = tokenizer(text, truncation=True, max_length=limit)["input_ids"]
        hidden = network.base_model(input_ids=torch.tensor([ids]))[0][0].tolist()
        pooled = hidden[0] if pooling == "first" else [sum(column) / len(ids) for column in zip(*hidden, strict=True)]
        norm = math.sqrt(sum(value * value for value in pooled))
        return [value / norm for value in pooled]

    queries = [vector(query, 6) for query, _ in PAIRS]
    documents = [vector(document, LIMIT) for _, document in PAIRS]
    losses, correct = [], []
    for number, query in enumerate(queries):
        scores = [sum(a * b for a, b in zip(query, document, strict=True)) / 0.01 for document in documents]
        losses.append(math.log(sum(map(math.exp, scores))) - scores[number])
        correct.append(float(scores[number] == max(scores)))

    batch = batch_of(tokenizer, PAIRS)
    for outputs in (model.train()(batch), model.eval().eval_forward(batch)):
        assert outputs["cross_entropies"].tolist() == pytest.approx(losses, abs=1e-3)
        assert outputs["correct"].tolist() == correct
        assert model.loss(outputs, batch).item() == pytest.approx(sum(losses) / 4, abs=1e-3)
    assert max(losses) - min(losses) > 0.1  # else it would not show which is which


def test_metrics_are_means_over_queries(tokenizer: PreTrainedTokenizerFast) -> None:
    model = new_model().eval()
    metrics = model.get_metrics()
    assert {name: type(metric) for name, metric in metrics.items()} == {
        kind.__name__: kind for kind in (ContrastiveCrossEntropy, ContrastiveAccuracy)
    }
    found: dict[str, list[float]] = {"cross_entropies": [], "correct": []}
    for pairs in (PAIRS[:3], PAIRS[3:]):  # batches of unequal size
        batch = batch_of(tokenizer, pairs)
        outputs = model.eval_forward(batch)
        for metric in metrics.values():
            model.update_metric(batch, outputs, metric)
        for key, values in found.items():
            values.extend(outputs[key].tolist())
    assert metrics["ContrastiveCrossEntropy"].compute() == pytest.approx(sum(found["cross_entropies"]) / 4)
    assert metrics["ContrastiveAccuracy"].compute() == pytest.approx(sum(found["correct"]) / 4)


def test_the_head_stays_and_is_not_trained(tokenizer: PreTrainedTokenizerFast) -> None:
    model = new_model()
    model(batch_of(tokenizer, PAIRS))["loss"].backward()
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == {name for name, _ in model.named_parameters() if name.startswith("model.bert.")}
    assert all((parameter.grad is None) == (name not in names) for name, parameter in model.named_parameters())


def rank(number: int, folder: Path, batch: dict[str, torch.Tensor], gather: bool) -> None:
    """Half of the batch on one of two ranks; leaves the loss and the averaged gradients."""
    torch.set_num_threads(1)  # the threads of the process that was forked are not here, and would be waited for
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=number, world_size=2)
    model = DistributedDataParallel(new_model(gather_negatives=gather))
    half = {name: value[2 * number : 2 * number + 2] for name, value in batch.items()}
    outputs = model(half)
    outputs["loss"].backward()
    evaluated = model.module.eval()(half)["loss"]
    gradients = {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}
    result = {"outputs": {key: value.detach() for key, value in outputs.items()}, "evaluated": evaluated.detach()}
    torch.save({**result, "gradients": gradients}, folder / f"{number}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("gather", [True, False])
def test_two_ranks_are_one_with_the_whole_batch(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, gather: bool
) -> None:
    batch = batch_of(tokenizer, PAIRS)
    context = multiprocessing.get_context("fork")  # which skips the seconds that importing takes
    ranks = [context.Process(target=rank, args=(number, tmp_path, batch, gather)) for number in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in range(2))

    model = new_model()
    halves = [{name: value[begin : begin + 2] for name, value in batch.items()} for begin in (0, 2)]
    parts = [batch] if gather else halves
    outputs = [model(part) for part in parts]
    torch.stack([part["loss"] for part in outputs]).mean().backward()
    for key in ("cross_entropies", "correct"):
        together = torch.cat([first["outputs"][key], second["outputs"][key]])
        torch.testing.assert_close(together, torch.cat([part[key] for part in outputs]), rtol=1e-4, atol=1e-5)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for found in (first, second):
        torch.testing.assert_close(found["gradients"], expected, rtol=1e-3, atol=1e-5)
    # An evaluation takes each rank's own batch: its metric must not depend on the number of ranks.
    for found, half in zip((first, second), halves, strict=True):
        torch.testing.assert_close(found["evaluated"], model.eval()(half)["loss"].detach(), rtol=1e-4, atol=1e-5)
