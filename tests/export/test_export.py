"""Exported folders in virtual environments that have torch, transformers 4 or 5 and sentence-transformers alone.

`make test-export` makes the environments and names them in EXPORT_4 and EXPORT_5. On a machine with a GPU the folders
are used there too.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bert import convert
from bert.checkpoint import save_original
from bert.configuration import M2BertConfig
from bert.data.tokenizer import load_tokenizer, train_wordpiece
from bert.inference import pool
from bert.modeling import M2BertForMaskedLM, M2BertForSequenceClassification

pytestmark = [pytest.mark.export, pytest.mark.xdist_group("export")]

VERSIONS = ("4", "5")
LENGTH = 16
FIELDS = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "hyena_filter_order": 8}
FIELDS |= {"max_position_embeddings": LENGTH, "long_conv_l_max": LENGTH, "initializer_range": 0.2}
MASKED, ATTENTION = {"mask_padding": True}, {"monarch_mixer_sequence_mixing": False, "num_attention_heads": 4}
CLASSES = {"num_labels": 3, "id2label": {0: "yes", 1: "maybe", 2: "no"}, "label2id": {"yes": 0, "maybe": 1, "no": 2}}
EMBEDS = {**CLASSES, "gather_sentence_embeddings": True, "use_normalized_embeddings": True, "pool_all": True}
MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "mlm": (M2BertForMaskedLM, {}),
    "mlm-mask_padding": (M2BertForMaskedLM, {**MASKED, "hyena_training_additions": True}),
    "mlm-attention": (M2BertForMaskedLM, ATTENTION),
    "classification": (M2BertForSequenceClassification, {**CLASSES, "classifier_dropout": 0.2}),
    "classification-mask_padding": (M2BertForSequenceClassification, {**CLASSES, **MASKED, "pool_all": True}),
    "classification-attention": (M2BertForSequenceClassification, {**CLASSES, **ATTENTION}),
    "embedding": (M2BertForSequenceClassification, {**EMBEDS, **MASKED}),
}
# Of as many tokens each: without mask_padding a text's vector depends on the padding beside it.
TEXTS = ["the cat sat on the mat", "a dog ran to the cat", "the mat is on the floor"]
DROPOUT = {"hidden_dropout_prob": 0.1}
Results = Callable[[str, str, str], list[Any]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models by name, exported to a folder each, with the tokenizer of all of them."""
    root = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    train_wordpiece(TEXTS * 20, 60).save_pretrained(root / "tokenizer")
    for name, (kind, fields) in MODELS.items():
        save_original(kind(M2BertConfig(**FIELDS, **DROPOUT, **fields)), root / f"{name}.pt")
        command = [str(root / f"{name}.pt"), str(root / name), "--tokenizer", str(root / "tokenizer")]
        assert convert.main(command) == 0
    return root


def inputs_of(name: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, FIELDS["vocab_size"], (3, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 9:], mask[2, 1:] = 0, 0
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, ids, -100)
    arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels, "classes": torch.tensor([0, 1, 2])}
    return {**{key: value.tolist() for key, value in arrays.items()}, "texts": TEXTS, "masked": "a [MASK] ran to the"}


@pytest.fixture(scope="module")
def results(folders: Path) -> Results:
    """What a check gives for a model in an environment: one result a device."""
    done: dict[str, dict[str, Any]] = {}
    (folders / "inputs.json").write_text(json.dumps({name: inputs_of(name) for name in MODELS}))

    def run(version: str) -> dict[str, Any]:
        environment = os.environ.get(f"EXPORT_{version}")
        assert environment, f"EXPORT_{version} names no virtual environment: use make test-export"
        outputs = folders / f"outputs-{version}.pt"
        script = Path(__file__).with_name("use_folders.py")
        paths = [str(folders / name) for name in MODELS]
        # -I: neither PYTHONPATH nor this folder are looked into.
        command = [f"{environment}/bin/python", "-I", str(script), str(folders / "inputs.json"), *paths, str(outputs)]
        settings = {"HF_HOME": str(folders / f"cache-{version}"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run(command, env={**kept, **settings}, check=True, timeout=1200, cwd=folders)
        return torch.load(outputs, weights_only=True)

    def results_of(version: str, name: str, check: str) -> list[Any]:
        if version not in done:
            done[version] = run(version)
        found = [by_check[check] for key, by_check in done[version].items() if key.split(" ")[0] == name]
        errors = [entry["error"] for entry in found if "error" in entry]
        assert not errors, "\n".join(errors)
        return [entry["value"] for entry in found]

    return results_of


@pytest.fixture
def model(folders: Path, name: str) -> Any:
    """Our model, as a run or an original checkpoint gives it."""
    return convert.read_source(folders / f"{name}.pt").model


def batch(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.tensor(inputs_of(name)[key]) for key in ("input_ids", "attention_mask")}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


HEADS = [name for name in MODELS if name != "embedding"]  # which has no logits


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", HEADS)
def test_logits_are_ours(results: Results, version: str, name: str, model: Any) -> None:
    with torch.inference_mode():
        expected = model(**batch(name)).logits
    for check in ("logits", "again"):
        for found in results(version, name, check):
            close(found, expected)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", MODELS)
def test_the_encoder_alone_is_ours(results: Results, version: str, name: str, model: Any) -> None:
    with torch.inference_mode():
        expected = model.bert(**batch(name)).last_hidden_state
    for found in results(version, name, "hidden"):
        close(found, expected)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", HEADS)
def test_a_training_step_is_ours(results: Results, version: str, name: str, model: Any) -> None:
    labels = torch.tensor(inputs_of(name)["labels" if name.startswith("mlm") else "classes"])
    loss = model(**batch(name), labels=labels).loss
    loss.backward()
    norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    for found in results(version, name, "step"):
        assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert found["norm"] == pytest.approx(torch.stack(norms).norm().item(), rel=1e-4)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["mlm", "classification"])
def test_tokens_are_ours(folders: Path, results: Results, version: str, name: str) -> None:
    expected = dict(load_tokenizer(str(folders / "tokenizer"))(*TEXTS[:2]))
    assert set(expected["token_type_ids"]) == {0, 1}
    for found in results(version, name, "tokens"):
        assert found == expected


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", HEADS)
def test_pipelines_are_ours(folders: Path, results: Results, version: str, name: str, model: Any) -> None:
    tokenizer = load_tokenizer(str(folders / "tokenizer"))

    def run(*texts: str) -> torch.Tensor:
        with torch.inference_mode():
            return model(**tokenizer(*texts, return_tensors="pt")).logits[0].softmax(-1)

    for found in results(version, name, "pipeline"):
        if name.startswith("mlm"):
            text = inputs_of(name)["masked"]
            place = tokenizer(text)["input_ids"].index(tokenizer.mask_token_id)
            scores, ids = run(text)[place].topk(5)
            assert [word for word, _ in found] == [tokenizer.decode([i]) for i in ids]
            close(torch.tensor([score for _, score in found]), scores)
            continue
        for scores, expected in zip(found, (run(TEXTS[0]), run(*TEXTS[:2])), strict=True):
            close(torch.tensor([scores[label] for label in ("yes", "maybe", "no")]), expected)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", MODELS)
def test_sentence_vectors_are_ours(folders: Path, results: Results, version: str, name: str, model: Any) -> None:
    encoded = load_tokenizer(str(folders / "tokenizer"))(TEXTS, return_tensors="pt", padding=True)
    assert encoded["attention_mask"].all()
    with torch.inference_mode():
        if name == "embedding":
            expected = model(**encoded).sentence_embedding
            close(expected, F.normalize(expected, dim=-1))
        else:
            expected = pool(model.bert(**encoded).last_hidden_state, encoded["attention_mask"], "mean")
    for found in results(version, name, "vectors"):
        close(found, expected)
