"""Longer context: each mode does to the filters what it says, and what is written loads where its source did."""

import json

import pytest
import torch

from bert import extend_context, load
from bert.checkpoint import load_original, save_original, to_original
from bert.configuration import M2BertConfig
from bert.errors import CheckpointError, RecipeError
from bert.export.folder import write_folder
from bert.extend_context import extend, extend_state_dict
from bert.modeling import M2BertForMaskedLM
from bert.trained import FINETUNED, LATEST_NAME, folder_pooling, load_trained
from monarch_mixer.filters import EXTENSION_MODES
from tests.bert.test_fill_mask import checkpoint, tokenizer  # noqa: F401 - fixtures
from tests.bert.test_modeling import SMALL

OLD = SMALL["long_conv_l_max"]  # 20


def make_model(**changes):
    model = M2BertForMaskedLM(M2BertConfig(**{**SMALL, "mask_padding": True, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # as if trained: position features too
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def extended(model, length, mode):
    fields = {name: getattr(model.config, name) for name in M2BertConfig.field_names()}
    longer = M2BertForMaskedLM(M2BertConfig(**{**fields, "max_position_embeddings": length, "long_conv_l_max": length}))
    longer.load_state_dict(extend_state_dict(model.state_dict(), length, mode))
    return longer.eval()


def filters(model):
    return [f for layer in model.bert.encoder.layers for f in layer.sequence_mixer.filters()]


@pytest.mark.parametrize("changes", [{}, {"bidirectional": False, "hyena_emb_dim": 3, "hyena_lr_pos_emb": 0}])
@pytest.mark.parametrize("length", [21, 33, 160])
@torch.no_grad()
def test_keep_taps_keeps_every_tap_and_output_bit_for_bit(length, changes):
    model = make_model(**changes)
    longer = extended(model, length, "keep-taps")
    for old, new in zip(filters(model), filters(longer), strict=True):
        for old_taps, new_taps in zip(old(OLD), new(OLD), strict=True):
            assert (old_taps is None and new_taps is None) or torch.equal(old_taps, new_taps)
        for old_taps, new_taps in zip(old(OLD), new(length), strict=True):  # among more rows a product rounds otherwise
            if old_taps is not None:
                torch.testing.assert_close(new_taps[:OLD], old_taps, rtol=1e-5, atol=1e-6)
        assert torch.equal(new.times[:OLD], old.times) and torch.equal(
            new.position_features[:OLD], old.position_features
        )
        spacing = new.times.diff()
        torch.testing.assert_close(spacing, torch.full_like(spacing, 1 / (OLD - 1)), rtol=1e-4, atol=0)
        # The grid goes on: what the last row was moved by in training stays, and the bands keep their period.
        grid = torch.arange(length) / (OLD - 1) + old.position_features[-1, 0] - 1
        torch.testing.assert_close(new.position_features[OLD:, 0], grid[OLD:])
    ids = torch.randint(1, 50, (2, OLD))
    assert torch.equal(longer(ids).logits, model(ids).logits)
    assert torch.isfinite(longer(torch.randint(1, 50, (1, length))).logits).all()


@torch.no_grad()
def test_an_untrained_grid_is_continued_as_it_began():
    model = M2BertForMaskedLM(M2BertConfig(**SMALL))
    once, twice = extended(model, 50, "keep-taps"), extended(extended(model, 30, "keep-taps"), 50, "keep-taps")
    for old, new, again in zip(filters(model), filters(once), filters(twice), strict=True):
        torch.testing.assert_close(new.position_features, again.position_features, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(new.times, again.times)
        period = new.position_features[OLD : 2 * OLD, 1:] - old.position_features[:, 1:]  # bands of 1e-4 and 1
        assert period.abs().max() < 2e-3


@torch.no_grad()
def test_interpolate_is_the_old_filter_at_stretched_lags():
    model = make_model()
    longer = extended(model, 3 * (OLD - 1) + 1, "interpolate")
    for old, new in zip(filters(model), filters(longer), strict=True):
        assert new.times[0] == 0 and new.times[-1] == 1
        for old_taps, new_taps in zip(old(OLD), new(new.max_length), strict=True):
            torch.testing.assert_close(new_taps[::3], old_taps, rtol=1e-4, atol=1e-5)
    table, stretched = (m.bert.embeddings.position_embeddings.weight for m in (model, longer))
    torch.testing.assert_close(stretched[::3], table)
    torch.testing.assert_close(stretched[1], (2 * table[0] + table[1]) / 3)


@pytest.mark.parametrize("length", [40, 47])
@torch.no_grad()
def test_tile_repeats_rows_and_stretches_the_decay(length):
    model = make_model()
    longer = extended(model, length, "tile")
    rows = torch.arange(length) % OLD
    table, tiled = (m.bert.embeddings.position_embeddings.weight for m in (model, longer))
    assert torch.equal(tiled, table[rows])
    assert torch.equal(extended(model, length, "keep-taps").bert.embeddings.position_embeddings.weight, table[rows])
    for old, new in zip(filters(model), filters(longer), strict=True):
        assert torch.equal(new.position_features, old.position_features[rows])
        torch.testing.assert_close(new.times, torch.linspace(0, 1, length))
        assert new.position_features[:OLD].abs().sum(1).min() > 0  # the original's first rows were zero
        decay = torch.exp(-(new.times[:OLD] - old.times)[:, None] * old.decay_rates.abs())
        torch.testing.assert_close(new(length)[0][:OLD], old(OLD)[0] * decay, rtol=1e-4, atol=1e-5)


def test_an_original_checkpoint_goes_there_and_back(goldens, tmp_path):
    config, tensors, weights = goldens("tiny_a")
    model = load_original(weights, config, "mlm")
    length = 3 * model.config.long_conv_l_max
    written = extend(weights, length, "keep-taps", tmp_path / "longer")
    fields = {k: v for k, v in config.items() if k not in ("max_position_embeddings", "long_conv_l_max")}
    longer = load_original(written, fields, "mlm")  # lengths are read from the weights
    assert longer.config.max_sequence_length == length
    ids = tensors["in.input_ids"]
    with torch.no_grad():
        assert torch.equal(longer(ids).logits, model(ids).logits)
    again = load_original(to_original(longer), fields, "mlm")
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), longer.state_dict().values(), strict=True)
    )


def test_a_run_is_a_run_again(checkpoint, capsys):  # noqa: F811
    folder, _ = checkpoint
    out = folder / "longer"
    assert extend_context.main([str(folder), "30", "--mode", "keep-taps", "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith(str(out / LATEST_NAME))
    trained = load_trained(out)
    assert trained.model.model.config.max_sequence_length == 30
    assert trained.record["extended"] == {"from": folder.name, "length": 30, "mode": "keep-taps"}
    assert len(load(out, device="cpu").fill_mask(["the cat [MASK] " * 6])[0]) == 6
    assert extend_context.main([str(folder), "40", "--out", str(out)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert extend_context.main([str(folder), "12", "--out", str(folder / "same")]) == 2
    assert "nothing in the model is shorter than 12" in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {"data", LATEST_NAME, "longer"}  # nothing half-written


@pytest.mark.parametrize("centered", [False, True])
def test_a_hugging_face_folder_is_one_again(tmp_path, centered):
    model = make_model(short_conv_centered=centered)
    model.save_pretrained(tmp_path / "old")
    assert extend(tmp_path / "old", 50, "keep-taps", tmp_path / "new") == tmp_path / "new"
    longer = M2BertForMaskedLM.from_pretrained(tmp_path / "new").eval()
    for name, value in extend_state_dict(model.state_dict(), 50, "keep-taps").items():
        assert torch.equal(longer.state_dict()[name], value)
    assert longer.config.max_sequence_length == 50 and longer.config.mask_padding
    assert longer.config.short_conv_centered is centered
    ids = torch.randint(1, 50, (2, OLD))
    torch.testing.assert_close(longer(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)


def test_all_of_an_exported_folder_is_for_the_new_length(tmp_path, tokenizer):  # noqa: F811
    (tmp_path / "old").mkdir()
    origin = {"source": "a test", "license": "mit", "data": "Words of one syllable."}
    write_folder(tmp_path / "old", make_model(vocab_size=64), tokenizer, pooling="first", origin=origin)
    (tmp_path / "old" / "LICENSE").write_text("MIT")
    new = extend(tmp_path / "old", 50, "tile", tmp_path / "new")
    assert {path.name for path in new.rglob("*")} == {path.name for path in (tmp_path / "old").rglob("*")}
    for name, field in (("tokenizer_config.json", "model_max_length"), ("sentence_bert_config.json", "max_seq_length")):
        assert json.loads((new / name).read_text())[field] == 50
    assert load(new, device="cpu").pooling == folder_pooling(new) == "first"
    card = (new / "README.md").read_text()
    assert (
        card.startswith("---\nlicense: mit\n")
        and "at most 50 tokens" in card
        and "extended to 50 tokens (tile)" in card
    )
    assert "## Data\n\nWords of one syllable.\n" in card and (new / "LICENSE").read_text() == "MIT"
    again = (extend(new, 60, "tile", tmp_path / "again") / "README.md").read_text()
    assert "60 tokens" in again and "50 tokens" not in again
    assert again.split("## Data")[1] == card.split("## Data")[1]


def test_an_original_checkpoint_keeps_the_configuration_it_holds(tmp_path, tokenizer):  # noqa: F811
    model = make_model(vocab_size=64, layer_norm_eps=1e-3, hyena_w_mod=2)  # which no weight shows
    save_original(model, tmp_path / "old.pt")
    tokenizer.save_pretrained(tmp_path)
    longer = load(extend(tmp_path / "old.pt", 50, "keep-taps", tmp_path / "new"), device="cpu")
    assert json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())["model_max_length"] >= 50
    config = longer.network.config
    assert (config.mask_padding, config.layer_norm_eps, config.hyena_w_mod, config.long_conv_l_max) == (
        True,
        1e-3,
        2,
        50,
    )
    text = "the cat [MASK]"
    assert longer.fill_mask([text]) == load(tmp_path / "old.pt", device="cpu").fill_mask([text])


def test_what_cannot_be_extended_or_written_is_said(checkpoint, capsys):  # noqa: F811
    folder, _ = checkpoint
    (folder / "file").write_text("x")
    for arguments, message in (
        (["40", "--out", folder / "file" / "below"], "file"),
        (["10000000000000", "--out", folder / "new"], "does not fit into memory"),
        (["40", "--out", folder / "file"], "exists already"),
    ):
        assert extend_context.main([str(folder), *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err
    assert extend_context.main([str(folder / "allocated memory.pt"), "40", "--out", str(folder / "new")]) == 2
    assert "there is no file" in capsys.readouterr().err
    torch.save({"kind": FINETUNED}, folder / "job.pt")
    assert extend_context.main([str(folder / "job.pt"), "40", "--out", str(folder / "new")]) == 2
    assert "fine-tuning job" in capsys.readouterr().err and not (folder / "new").exists()


@pytest.mark.parametrize("mode", EXTENSION_MODES)
def test_the_attention_baseline_has_positions_alone(mode):
    model = make_model(monarch_mixer_sequence_mixing=False)
    state = extend_state_dict(model.state_dict(), 31, mode)
    changed = [name for name, value in model.state_dict().items() if value.shape != state[name].shape]
    assert changed == ["bert.embeddings.position_embeddings.weight"]


def test_mistakes_are_named(tmp_path):
    state = make_model().state_dict()
    name = "bert.encoder.layers.0.sequence_mixer.filter.times"
    with pytest.raises(CheckpointError, match="not evenly spaced"):
        extend_state_dict({**state, name: state[name] ** 2}, 30, "keep-taps")
    with pytest.raises(CheckpointError, match="no whole M2-BERT"):
        extend_state_dict({k: v for k, v in state.items() if k != name}, 30, "tile")
    with pytest.raises(RecipeError, match="holds neither"):
        extend(tmp_path, 30, "tile", tmp_path / "out")
