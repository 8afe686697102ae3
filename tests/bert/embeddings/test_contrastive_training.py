"""Contrastive training through the recipe: it learns, resumes, leaves a model to load, and refuses what cannot work."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from composer.core import State

from bert import load
from bert.configuration import M2BertConfig
from bert.data.tokenizer import fingerprint, load_tokenizer, train_wordpiece
from bert.embeddings.task import ContrastiveTask
from bert.errors import DataError, RecipeError
from bert.modeling import M2BertForMaskedLM
from bert.recipe.builders import check_config
from bert.recipe.callbacks import NaNGuard
from bert.recipe.schema import load_config
from bert.recipe.train import main, train
from tests.bert.recipe.conftest import _leave_no_trace, data, recipe

__all__ = ["_leave_no_trace", "data", "recipe"]

WORDS = ["cat", "dog", "sun", "sea", "tree", "house", "road", "stone", "bird", "fish"]
MODEL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "long_conv_l_max": 16,
    "hyena_filter_order": 8,
    "hyena_w": 1,
    "hidden_dropout_prob": 0.1,
    "initializer_range": 0.1,
}


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A pretrained model, so to speak; with padding as text, as the published ones."""
    M2BertForMaskedLM(M2BertConfig(**MODEL)).save_pretrained(tmp_path / "start")
    train_wordpiece([" ".join(WORDS)] * 20, 60).save_pretrained(tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def contrastive(recipe: Callable[..., Path], start: Path, tmp_path: Path) -> list[str]:
    """The command line of a tiny recipe: a query is a word, its document five words with that one among them."""
    draw = random.Random(1)
    (tmp_path / "pairs").mkdir()
    for split, number in (("train", 96), ("validation", 20)):
        rows = [{"query": (word := WORDS[i % 10]), "document": " ".join([word, *draw.choices(WORDS, k=4)])}
                for i in range(number)]  # fmt: skip
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "pairs" / f"{split}.jsonl").write_text(lines)
    path = recipe(
        task="contrastive",
        data_local=str(tmp_path / "pairs"),
        contrastive={"checkpoint": str(start), "query_length": 8, "pooling": "first"},
        model={"name": "m2_bert", "config": {**MODEL, "mask_padding": True}},
        device_train_microbatch_size="auto",
    )
    return [str(path)]


@pytest.mark.parametrize("name", ["m2-small", "m2-base-2k"])
def test_the_recipes_can_be_trained(name: str) -> None:
    config = load_config(Path(__file__).parents[3] / "yamls" / "embeddings" / f"{name}.yaml")
    check_config(config)
    assert config.task == "contrastive" and config.contrastive.checkpoint is not None
    assert config.model.config["mask_padding"] and config.model.config["long_conv_l_max"] == 2048
    assert config.device_train_microbatch_size == "auto"  # a smaller one would be refused


def logged(folder: Path, event: str = "train") -> list[dict]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [line for line in map(json.loads, text.splitlines()) if line["event"] == event]


def test_it_learns_and_leaves_a_model_that_knows_its_pooling(
    contrastive: list[str], start: Path, tmp_path: Path
) -> None:
    assert main([*contrastive, "contrastive.pooling=mean", "max_duration=36ba", "eval_interval=12ba"]) == 0
    folder = tmp_path / "runs" / "tiny"
    evaluations = [line["metrics/eval/ContrastiveCrossEntropy"] for line in logged(folder, "eval")]
    assert len(evaluations) == 3 and evaluations[-1] < evaluations[0] - 0.3
    assert logged(folder)[-1]["sample"] == 36 * 8

    model, before = load(folder, device="cpu"), load(start, device="cpu")
    assert model.pooling == "mean" and model.record["tokenizer_name"] == str(start)
    texts = [*WORDS, "cat sun sun"]
    assert np.abs(model.encode(texts) - before.encode(texts)).max() > 0.1
    np.testing.assert_array_equal(model.encode(texts), model.encode(texts, pooling="mean"))
    # The head is not trained, but there: filling masks still works.
    kept, old = model.network.state_dict(), before.network.state_dict()
    head = [name for name in old if not name.startswith("bert.") and "decoder" not in name]  # that is the embeddings'
    assert head and all(torch.equal(kept[name], old[name]) for name in head)
    assert len(model.fill_mask(["cat [MASK]"])[0][0]) == 5


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(contrastive: list[str], tmp_path: Path) -> None:
    common = [*contrastive, "max_duration=18ba", "autoresume=true"]  # an epoch has 12 batches
    assert main([*common, "run_name=whole"]) == 0
    original = NaNGuard.batch_end
    for batch in (6, 14):

        def batch_end(self: NaNGuard, state: State, logger: object, batch: int = batch) -> None:
            original(self, state, logger)  # type: ignore[arg-type]
            if state.timestamp.batch.value == batch:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(NaNGuard, "batch_end", batch_end)
            main([*common, "run_name=stopped"])
    assert main([*common, "run_name=stopped"]) == 0
    whole, stopped = (tmp_path / "runs" / name for name in ("whole", "stopped"))
    for event, key in (("train", "loss/train/total"), ("eval", "metrics/eval/ContrastiveCrossEntropy")):
        values = [[(line["batch"], line[key]) for line in logged(folder, event)] for folder in (whole, stopped)]
        assert values[0] == values[1]
    weights = [load(folder, device="cpu").network.state_dict() for folder in (whole, stopped)]
    assert load(stopped, device="cpu").pooling == "first"
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.config.mask_padding=false"], "set model.config.mask_padding=true"),
        (["model.config.hidden_size=24"], "start does not fit the recipe's model: .*size mismatch"),
        (["model.config.num_hidden_layers=2"], "start does not fit the recipe's model: .*Missing key"),
        (["contrastive.checkpoint=nowhere"], "nowhere"),
        (["contrastive.checkpoint=null"], "contrastive.checkpoint is missing"),
        (["contrastive.temperature=0"], "contrastive.temperature must be positive, not 0"),
        (["contrastive.pooling=meen"], "pooling 'meen': did you mean 'mean'"),
        (["contrastive.query_length=17"], "the model takes 16 tokens"),
        (["max_seq_len=17"], "the model takes 16 tokens"),
    ],
)
def test_what_cannot_work_is_refused(contrastive: list[str], overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ContrastiveTask(load_config(contrastive[0], overrides))


@pytest.mark.parametrize(
    ("overrides", "kind", "message"),
    [
        (
            ["device_train_microbatch_size=2"],
            RecipeError,
            "microbatch_size 2 would leave a query 1 negatives of the 7 of its batch",
        ),
        (["global_train_batch_size=128", "device_train_microbatch_size=128"], DataError, "96 training pairs"),
        (["data_local=nowhere"], DataError, "nowhere/train.jsonl; make it with"),
    ],
)
def test_nor_is_a_run_begun(
    contrastive: list[str], overrides: list[str], kind: type[RecipeError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        train(load_config(contrastive[0], overrides))


def test_a_run_started_over_has_its_own_tokenizer(tmp_path: Path) -> None:
    first, second = (train_wordpiece([word * 3 for word in words], 40) for words in (["ab", "ba"], ["cd", "dc"]))
    for tokenizer in (first, second, second):
        ContrastiveTask.save_tokenizer(cast(Any, SimpleNamespace(tokenizer=tokenizer)), tmp_path)
        assert fingerprint(load_tokenizer(str(tmp_path / "tokenizer"))) == fingerprint(tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]
