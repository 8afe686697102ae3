"""Hugging Face folders: what is loaded is what was checked, the folder's own weights, all of them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining

from bert import extend_context
from bert.checkpoint import to_original
from bert.configuration import M2BertConfig
from bert.data.tokenizer import train_wordpiece
from bert.errors import CheckpointError, DataError
from bert.glue.model import Start
from bert.modeling import M2BertForMaskedLM
from bert.trained import open_model

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
SIZES |= {"max_position_embeddings": 12}
MONARCH = {"long_conv_l_max": 12, "hyena_filter_order": 4}
IDS = torch.arange(10)[None]
ELSEWHERE = {"transformers_weights": "../other/model.safetensors"}
QUANTIZED = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}


@pytest.fixture
def folders(tmp_path):
    """Return a function that writes folders `own` and `other` of models of a kind; it gives the first and its model."""

    def write(kind=BertForMaskedLM, config=None):
        torch.manual_seed(1)
        for name in ("other", "own"):
            model = kind(config or BertConfig(**SIZES)).eval()
            model.save_pretrained(tmp_path / name)
            train_wordpiece(["the cat sat on the mat"] * 20, 60).save_pretrained(tmp_path / name)
        return tmp_path / "own", model

    return write


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def opened(folder):
    network = open_model(folder).network
    with torch.no_grad():
        return network.predict(network.base_model(IDS)[0])


@pytest.mark.parametrize("changes", [{}, ELSEWHERE, QUANTIZED, {"attn_implementation": "somebody/code"}], ids=str)
def test_a_bert_has_its_own_folders_weights(folders, changes):
    folder, model = folders()
    change_config(folder, **changes)
    with torch.no_grad():
        torch.testing.assert_close(opened(folder), model(IDS).logits)


def test_a_bert_with_spare_heads_and_old_names_is_read(folders):
    """As bert-base-uncased is: pooler and next-sentence head, LayerNorm's old names, position ids, all tied names."""
    folder, model = folders(BertForPreTraining)
    expected = model(IDS).prediction_logits.detach()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for new, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
        state = {name.replace(new, old): value for name, value in state.items()}
    state["bert.embeddings.position_ids"] = torch.arange(12)[None]
    save_file(state, folder / "model.safetensors")
    torch.testing.assert_close(opened(folder), expected)
    for left_out in ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"):
        del state[left_out]
        save_file(state, folder / "model.safetensors")
        torch.testing.assert_close(opened(folder), expected)


def test_a_bert_whose_head_is_not_tied_keeps_it(folders):
    folder, model = folders(BertForMaskedLM, BertConfig(**SIZES, tie_word_embeddings=False))
    with torch.no_grad():
        torch.testing.assert_close(opened(folder), model(IDS).logits)
    state = load_file(folder / "model.safetensors")
    del state["cls.predictions.decoder.weight"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing     cls\.predictions\.decoder\.weight"):
        open_model(folder)


def test_every_weight_of_a_bert_counts(folders):
    folder, _ = folders()
    whole = load_file(folder / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.bias"
    words = "bert.embeddings.word_embeddings.weight"
    for state, message in (
        ({**whole, "odd": torch.zeros(1)}, "unexpected  odd"),
        ({key: value for key, value in whole.items() if key != name}, f"missing     {name}"),
        ({**whole, name: torch.zeros(3)}, f"shape       {name}"),
        ({**whole, "cls.predictions.decoder.weight": whole[words] + 1}, "differ in the file"),
    ):
        save_file(state, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            open_model(folder)


@pytest.mark.parametrize("changes", [ELSEWHERE, QUANTIZED], ids=str)
def test_folders_that_lead_elsewhere_are_refused_where_transformers_loads(folders, tmp_path, capsys, changes):
    (key,) = changes
    folder, _ = folders()
    change_config(folder, **changes)
    with pytest.raises(CheckpointError, match=f"config.json is refused: its {key}"):
        Start("hf_bert", {}, str(folder)).build(2, "first")
    folder, _ = folders(M2BertForMaskedLM, M2BertConfig(**SIZES, **MONARCH))
    change_config(folder, **changes)
    assert extend_context.main([str(folder), "20", "--out", str(tmp_path / "out")]) == 2
    assert f"config.json is refused: its {key}" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", [BertConfig(**SIZES), M2BertConfig(**SIZES, **MONARCH)], ids=["bert", "m2"])
def test_a_tokenizer_larger_than_the_model_is_refused(folders, tmp_path, config):
    kind = BertForMaskedLM if isinstance(config, BertConfig) else M2BertForMaskedLM
    folder, model = folders(kind, config)
    words = " ".join(f"{a}{b}" for a in "abcdefgh" for b in "abcdefgh")
    large = train_wordpiece([words] * 20, 90)
    large.save_pretrained(tmp_path / "large")
    places = [folder]
    if kind is M2BertForMaskedLM:
        places.append(folder / "original.pt")
        torch.save({name: value.clone() for name, value in to_original(model).items()}, places[-1])
    message = f"has {len(large)} entries, the model's vocab_size is 64"
    for place in places:
        with pytest.raises(DataError, match=message):
            open_model(place, str(tmp_path / "large"))
        open_model(place)
    large.save_pretrained(folder)
    with pytest.raises(DataError, match=message):
        open_model(folder)
