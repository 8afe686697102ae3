import csv
import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

from bert import embed, inference, load
from bert.checkpoint import save_original, to_original
from bert.configuration import M2BertConfig
from bert.data.tokenizer import train_wordpiece
from bert.errors import CheckpointError, DataError, RecipeError
from bert.export.folder import write_folder
from bert.inference import LoadedModel, length_batches
from bert.modeling import M2BertForMaskedLM, M2BertForSequenceClassification

TEXTS = ["the cat sat on the mat", "a dog", "the mat is on the floor and the cat is on the mat", "cat", "", "a dog ran"]
LIMIT = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Hugging Face folders of an M2-BERT, of the attention baseline, and of Hugging Face's own BERT."""
    torch.manual_seed(1)
    tokenizer = train_wordpiece(TEXTS * 20, 60)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": LIMIT,
    }
    monarch = {"long_conv_l_max": LIMIT, "hyena_filter_order": 4, "hyena_w": 1}
    models = {
        "m2": M2BertForMaskedLM(M2BertConfig(**sizes, **monarch)),
        "attention": M2BertForMaskedLM(M2BertConfig(**sizes, monarch_mixer_sequence_mixing=False)),
        "hf": BertForMaskedLM(BertConfig(**sizes)),
    }
    root = tmp_path_factory.mktemp("models")
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def alone(model, text, pooling):
    ids = model.tokenizer(text)["input_ids"]
    ids = [*ids[: LIMIT - 1], ids[-1]] if len(ids) > LIMIT else ids
    with torch.no_grad():
        hidden = model.network.base_model(input_ids=torch.tensor([ids]))[0][0]
    return (hidden[0] if pooling == "first" else hidden.mean(0)).numpy()


@pytest.mark.parametrize("name", ["m2", "attention", "hf"])
def test_a_vector_is_that_of_the_text_alone_whatever_the_batch(folders, name):
    model = load(folders / name, device="cpu")
    for pooling in ("mean", "first"):
        expected = np.stack([alone(model, text, pooling) for text in TEXTS])
        for batch_tokens in (1, 20, 10_000):
            for order in (range(len(TEXTS)), [3, 0, 5, 2, 4, 1]):
                texts = [TEXTS[index] for index in order]
                found = model.encode(texts, pooling=pooling, normalize=False, batch_tokens=batch_tokens)
                assert found.dtype == np.float32
                np.testing.assert_allclose(found, expected[list(order)], atol=1e-5)
    normal = model.encode(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(normal, axis=1), 1, atol=1e-5)
    assert model.encode([]).shape == (0, 16)


def test_long_texts_are_cut_with_one_warning(folders, caplog):
    model = load(folders / "m2", device="cpu")
    model.encode([TEXTS[2] + " cat", TEXTS[2]])
    model.encode([TEXTS[2] + " dog"])
    assert model.truncated == 3 and len(caplog.records) == 1 and "cut to 12" in caplog.text
    short = model.encode(["the cat sat on"], max_length=4)
    np.testing.assert_allclose(short, model.encode(["the cat"]), atol=1e-6)
    with pytest.raises(RecipeError, match="2 to 12"):
        model.encode(["cat"], max_length=13)
    with pytest.raises(RecipeError, match="did you mean 'mean'"):
        model.encode(["cat"], pooling="meen")


ADDED = {
    "none": [],
    "as written": [
        AddedToken("[the]", normalized=False, lstrip=True),
        AddedToken("[e.]", normalized=False, rstrip=True),
        AddedToken("cd", normalized=False, single_word=True),
    ],
    "with a blank": [AddedToken("a b", normalized=False), AddedToken("[the\nend]", normalized=False)],
    "normalized": [AddedToken("\u00e9", normalized=True, lstrip=True)],
}
ODD_TEXT = st.lists(
    st.one_of(
        st.text(max_size=6),
        st.text("abcde", min_size=20, max_size=130),  # a word of more than 100 is unknown
        st.text(" \n\t\r\x0b\x1c\x85\u00a0\u2028\u3000\u200b\0", max_size=30),
        st.sampled_from(
            ["the", "a", " b", " ", "\n", "cd", "[MASK]", "[SEP] ", "[MA SK]", "[the]", "[e.]", "[the\nend]"]
        ),
        st.sampled_from(
            ["a b", "the cd", "e\u0301", "\u0301", " \u0301", "<\u0338", "\n\u0338", "ΑΣ", "Σ ", "İ", "日本", "日 the"]
        ),
    ),
    max_size=20,
).map("".join)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Tokenizers by their added tokens; those of the last are not divided at blanks."""
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    letters = "abcdefghijklmnopqrstuvwxyzé\u03c3ς日.,[]<"
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *(f"##{c}" for c in letters),
        "the",
        "##he",
        "##cd",
    ]
    path.write_text("\n".join(words) + "\n", encoding="utf-8")
    made = {}
    for name, added in ADDED.items():
        for lower in (True, False):
            made[name, lower] = BertTokenizerFast(vocab_file=str(path), do_lower_case=lower)
            made[name, lower].add_tokens(added)
    made["other"] = BertTokenizerFast(vocab_file=str(path))
    made["other"].backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(".", "removed")
    return made


NAMES = st.sampled_from([*((name, lower) for name in ADDED for lower in (True, False)), "other"])


@settings(max_examples=400, deadline=None)
@given(text=ODD_TEXT, name=NAMES)
def test_tokens_before_a_blank_do_not_depend_on_what_follows(tokenizers, text, name):
    tokenizer = tokenizers[name]
    divided = inference._tokens_end_at_blanks(tokenizer.backend_tokenizer)
    assert divided == (name[0] in ("none", "as written"))
    whole = tokenizer.encode(text, add_special_tokens=False)
    for place in range(len(text) if divided else 0):
        part = tokenizer.encode(inference._beginning(text, place), add_special_tokens=False)
        assert whole[: len(part)] == part


@settings(max_examples=500, deadline=None)
@given(
    texts=st.lists(ODD_TEXT, max_size=3),
    limit=st.one_of(st.integers(2, 12), st.integers(2, 300)),
    name=NAMES,
    characters=st.integers(1, inference._CHARACTERS),
)
def test_the_ids_are_those_of_whole_texts(tokenizers, texts, limit, name, characters):
    tokenizer = tokenizers[name]
    whole = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    tokenizer("the", truncation=True, max_length=4, padding="max_length", split_special_tokens=True)  # leaves traces
    model = LoadedModel(None, tokenizer, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "_CHARACTERS", characters)
        found = model.tokenize(texts, limit)
    assert found == [ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]] for ids in whole]
    assert model.truncated == sum(len(ids) > limit for ids in whole)


def test_of_a_long_text_only_the_beginning_is_tokenised(tokenizers, monkeypatch):
    parts, beginning = [], inference._beginning
    monkeypatch.setattr(inference, "_beginning", lambda *of: parts.append(beginning(*of)) or parts[-1])
    words, blanks = "the end " * 10_000, "the" + " " * 1_000 + "the end " * 10_000
    for name, lengths in (("as written", [600, 603, 1202]), ("with a blank", [len(blanks), len(words)])):
        LoadedModel(None, tokenizers[name, True], torch.device("cpu")).tokenize([blanks, words], 100)
        assert sorted(map(len, parts)) == sorted(lengths)
        parts.clear()


def test_batches_keep_to_the_budget_and_hold_every_text_once():
    lengths = [5, 3, 9, 3, 3, 1, 20]
    for equal in (False, True):
        batches = list(length_batches(lengths, 10, equal=equal))
        assert sorted(index for batch in batches for index in batch) == list(range(7))
        for batch in batches:
            own = [lengths[index] for index in batch]
            assert len(own) == 1 or len(own) * max(own) <= 10
            assert not equal or len(set(own)) == 1


def test_checkpoints_of_the_original_code_load(folders, tmp_path):
    ours = load(folders / "m2", device="cpu")
    published = tmp_path / "published"
    published.mkdir()
    config = {"monarch_mixer_sequence_mixing": True, "intermediate_size": 16, "hyena_w": 1, "model_type": "bert"}
    (published / "config.json").write_text(json.dumps(config))
    state = {name: value.clone() for name, value in to_original(ours.network).items()}
    torch.save(state, published / "pytorch_model.bin")
    with pytest.raises(DataError, match="--tokenizer"):
        load(published)
    for path in (published, published / "pytorch_model.bin"):  # a folder, and a file beside its config.json
        original = load(path, tokenizer=str(folders / "m2"), device="cpu")
        np.testing.assert_array_equal(original.encode(TEXTS), ours.encode(TEXTS))
    with pytest.raises(CheckpointError, match="holds no model"):
        load(tmp_path)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_file_becomes_vectors_in_its_order(folders, tmp_path, capsys):
    source = write(tmp_path / "docs.jsonl", [{"key": f"d{i}", "text": text} for i, text in enumerate(TEXTS)])
    model = load(folders / "hf", device="cpu")
    arguments = [str(folders / "hf"), "--input", str(source), "--device", "cpu", "--chunk", "4", "--output"]
    assert embed.main([*arguments, str(tmp_path / "v.parquet"), "--id-column", "key"]) == 0
    assert "6 vectors of 16" in capsys.readouterr().out
    table = pq.read_table(tmp_path / "v.parquet").to_pydict()
    assert table["id"] == [f"d{i}" for i in range(6)]
    numbered = write(tmp_path / "numbers.jsonl", [{"key": 7 - i, "text": text} for i, text in enumerate(TEXTS)])
    embed.embed_file(model, numbered, tmp_path / "n.parquet", id_column="key")
    assert pq.read_table(tmp_path / "n.parquet").to_pydict()["id"] == ["7", "6", "5", "4", "3", "2"]
    with pytest.raises(DataError, match=r"no column 'kye'.*--id-column"):
        embed.embed_file(model, numbered, tmp_path / "k.parquet", id_column="kye")
    np.testing.assert_allclose(table["vector"], model.encode(TEXTS), atol=1e-5)
    assert not (tmp_path / "v.parquet.parts").exists()

    (tmp_path / "docs.txt.gz").write_bytes(gzip.compress("\n".join(TEXTS[:4]).encode()))
    embed.embed_file(
        model, tmp_path / "docs.txt.gz", tmp_path / "v.npy", text_documents="line", pooling="first", normalize=False
    )
    expected = model.encode(TEXTS[:4], pooling="first", normalize=False)
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, atol=1e-5)


def test_other_settings_and_broken_lines_are_errors(folders, tmp_path, capsys):
    source = write(tmp_path / "docs.jsonl", [{"text": "cat"}, {"text": 3}])
    output = tmp_path / "v.npy"
    command = [str(folders / "m2"), "--input", str(source), "--output", str(output), "--chunk", "1", "--device", "cpu"]
    assert embed.main(command) == 2
    assert f"{source}, line 2: column 'text' holds no text but int" in capsys.readouterr().err
    assert len(list((tmp_path / "v.npy.parts").glob("part-*"))) == 1
    assert embed.main([*command, "--pooling", "first"]) == 2
    error = capsys.readouterr().err
    assert "pooling was mean, now first" in error and "--restart" in error
    write(source, [{"text": "cat"}])
    assert embed.main([*command, "--restart"]) == 0
    assert embed.main(command) == 0
    assert "already there" in capsys.readouterr().out
    assert embed.main([*command, "--max-length", "5"]) == 2
    assert "max_length was 12, now 5" in capsys.readouterr().err
    assert embed.main([*command[:4], str(tmp_path / "v.csv")]) == 2


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_are_read_with_their_identifiers(folders, tmp_path, capsys, kind):
    source, output = tmp_path / f"docs.{kind}", tmp_path / "v.parquet"
    texts = ["the cat, sat\non the mat", "a dog", 'the "mat"']  # what CSV must quote
    names = ["x1", "x2", "x3"]
    if kind == "csv":
        with open(source, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["body", "key"], *zip(texts, names, strict=True)])
    else:
        pq.write_table(pa.table({"body": texts, "key": names}), source)
    command = [str(folders / "m2"), "--input", str(source), "--output", str(output), "--device", "cpu"]
    assert embed.main(command) == 2  # there is no column text
    assert "body, key" in capsys.readouterr().err
    command += ["--text-column", "body"]  # nothing was embedded: the corrected command needs no --restart
    assert embed.main([*command, "--id-column", "key"]) == 0
    table = pq.read_table(output).to_pydict()
    assert table["id"] == names
    np.testing.assert_allclose(table["vector"], load(folders / "m2", device="cpu").encode(texts), atol=1e-6)
    assert embed.main([*command, "--restart"]) == 0
    assert pq.read_table(output)["id"].to_pylist() == [0, 1, 2]


def test_an_interrupted_run_goes_on_and_gives_the_same_file(folders, tmp_path, capsys, monkeypatch):
    source = write(tmp_path / "docs.jsonl", [{"text": f"{TEXTS[i % 6]} {TEXTS[i % 5]}"} for i in range(11)])
    command = [str(folders / "m2"), "--input", str(source), "--device", "cpu", "--chunk", "2", "--output"]
    encode, calls = LoadedModel.encode, []

    def interrupted(self, texts, **options):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(len(texts))
        return encode(self, texts, **options)

    for name in ("v.parquet", "v.npy"):
        whole = tmp_path / f"whole-{name}"
        assert embed.main([*command, str(whole)]) == 0
        output, parts = tmp_path / name, tmp_path / f"{name}.parts"
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(LoadedModel, "encode", interrupted)
            assert embed.main([*command, str(output)]) == 130
        assert "run the same command again" in capsys.readouterr().err
        assert len(list(parts.glob("part-*"))) == 3 and not output.exists()
        assert embed.main([*command, str(output)]) == 0
        assert "11 vectors of 16; 5 made now" in capsys.readouterr().out
        assert not parts.exists() and output.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("restart", [False, True], ids=["at the end", "at --restart"])
def test_parts_are_never_left_without_their_settings(folders, tmp_path, monkeypatch, restart):
    source, output = write(tmp_path / "docs.jsonl", [{"text": text} for text in TEXTS]), tmp_path / "v.npy"
    first, second = load(folders / "m2", device="cpu"), load(folders / "attention", device="cpu")
    embed.embed_file(second, source, tmp_path / "second.npy", chunk=2)
    if restart:
        write(source, [{"text": text} for text in TEXTS[:4]] + [{"text": 3}])
        with pytest.raises(DataError, match="line 5"):
            embed.embed_file(first, source, output, chunk=2)
        write(source, [{"text": text} for text in TEXTS])

    def torn(folder):
        (folder / "settings.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embed.shutil, "rmtree", torn)
        with pytest.raises(KeyboardInterrupt):
            embed.embed_file(first, source, output, chunk=2, restart=restart)
    if not restart:
        with pytest.raises(DataError, match="model was"):
            embed.embed_file(second, source, output, chunk=2)
        output.unlink()
    embed.embed_file(second, source, output, chunk=2)
    assert output.read_bytes() == (tmp_path / "second.npy").read_bytes()
    assert not list(tmp_path.glob("*parts*")) and not list(tmp_path.glob(".*parts*"))


def test_parts_that_nothing_speaks_for_are_refused(folders, tmp_path, capsys):
    source, output = write(tmp_path / "docs.jsonl", [{"text": "cat"}, {"text": 3}]), tmp_path / "v.npy"
    command = [str(folders / "m2"), "--input", str(source), "--output", str(output), "--chunk", "1", "--device", "cpu"]
    assert embed.main(command) == 2
    (tmp_path / "v.npy.parts" / "settings.json").unlink()
    write(source, [{"text": "cat"}])
    assert embed.main(command) == 2
    error = capsys.readouterr().err
    assert "v.npy.parts is there, and nothing says what made it; --restart" in error and not output.exists()
    assert embed.main([*command, "--restart"]) == 0


def test_what_the_model_does_not_take_is_refused_before_anything_is_made(folders, tmp_path, capsys):
    source, output = write(tmp_path / "docs.jsonl", [{"text": "cat"}]), tmp_path / "out" / "v.npy"
    command = [str(folders / "m2"), "--input", str(source), "--output", str(output), "--device", "cpu"]
    for length in ("999", "0", "1"):
        assert embed.main([*command, "--max-length", length]) == 2
        assert f"max_length {length}: this model takes 2 to 12" in capsys.readouterr().err
    model = load(folders / "m2", device="cpu")
    for wrong in ({"pooling": "meen"}, {"pooling": ""}, {"text_documents": "lines"}):
        with pytest.raises(RecipeError, match=next(iter(wrong))):
            embed.embed_file(model, source, output, **wrong)
    assert not output.parent.exists()
    assert embed.main(command) == 0
    assert embed.main([*command, "--max-length", "999", "--restart"]) == 2
    assert output.exists()


@pytest.mark.parametrize("below", ["v.npy", "deep/v.npy", "deep/er/v.npy"])
def test_an_output_below_a_file_is_one_message(folders, tmp_path, capsys, below):
    source = write(tmp_path / "docs.jsonl", [{"text": "cat"}])
    output = source / below
    assert embed.main([str(folders / "m2"), "--input", str(source), "--output", str(output), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --output {output}: it lies below a file") and error.count("\n") == 1


@pytest.mark.parametrize("name", ["m2", "attention", "hf"])
def test_logits_at_places_are_those_of_the_whole_network(folders, name):
    model = load(folders / name, device="cpu")
    rows = np.array([[5, 6, 7, 8, 9, 10], [9, 8, 7, 6, 5, 5]])
    places = [(1, 2), (0, 0), (1, 5)]
    found = model.logits_at(rows, np.array(places))
    assert found.dtype == torch.float32
    with torch.no_grad():
        whole = model.network.predict(model.network.base_model(input_ids=torch.tensor(rows))[0])
    assert found.shape == (3, len(model.tokenizer)) and whole.shape[-1] == 64
    for row, (text, place) in zip(found, places, strict=True):
        torch.testing.assert_close(row, whole[text, place, : len(model.tokenizer)], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.logits_at(rows.tolist(), places), found)
    assert model.logits_at(rows, []).shape == (0, len(model.tokenizer))
    if name != "m2":  # which takes padding for text here
        padded = model.logits_at([[5, 6, 7], [9, 8]], [(1, 1)], width=LIMIT)
        torch.testing.assert_close(padded, model.logits_at([[9, 8]], [(0, 1)]), atol=1e-5, rtol=1e-5)


def test_models_with_a_classifier_embed_too(folders, tmp_path):
    """Those that give sentence embeddings themselves give these, the others pooled hidden states."""
    torch.manual_seed(2)
    tokenizer = load(folders / "m2", device="cpu").tokenizer
    fields = M2BertForMaskedLM.from_pretrained(folders / "m2").config.to_dict()
    for name, changes in (
        ("classes", {"num_labels": 3, "mask_padding": True, "pool_all": True}),
        ("own", {"gather_sentence_embeddings": True, "use_normalized_embeddings": True, "pool_all": True}),
    ):
        network = M2BertForSequenceClassification(M2BertConfig(**{**fields, **changes})).eval()
        (tmp_path / name).mkdir()
        write_folder(tmp_path / name, network, tokenizer, pooling="mean", origin={"source": "a test"})
        save_original(network, tmp_path / f"{name}.pt")
        for path, words in ((tmp_path / name, None), (tmp_path / f"{name}.pt", str(tmp_path / name))):
            model = load(path, tokenizer=words, device="cpu")
            assert model.pooling == ("own" if name == "own" else "mean")
            if name == "classes":
                expected = np.stack([alone(model, text, "mean") for text in TEXTS])
            else:
                rows = model.tokenize(TEXTS, LIMIT)
                with torch.no_grad():
                    given = [network(torch.tensor([row]), torch.ones(1, len(row))).sentence_embedding for row in rows]
                expected = torch.cat(given).numpy()
            np.testing.assert_allclose(model.encode(TEXTS, normalize=name == "own"), expected, atol=1e-5)
            with pytest.raises(RecipeError, match="no head that predicts words"):
                model.fill_mask(["the [MASK]"])
    masked = M2BertForMaskedLM(M2BertConfig(**{**fields, "gather_sentence_embeddings": True}))  # which it cannot give
    masked.save_pretrained(tmp_path / "masked")
    model = load(tmp_path / "masked", tokenizer=str(folders / "m2"), device="cpu")
    assert model.pooling == "mean" and model.encode(TEXTS).shape == (len(TEXTS), 16)
    for given in (model, load(folders / "m2", device="cpu")):
        with pytest.raises(RecipeError, match="gives no sentence embeddings itself"):
            given.encode(TEXTS, pooling="own")


def test_one_text_in_place_of_a_list_is_an_error(folders):
    model = load(folders / "m2", device="cpu")
    for call in (model.encode, model.fill_mask):
        with pytest.raises(RecipeError, match="a list of texts is wanted"):
            call("the [MASK]")
    with pytest.raises(RecipeError, match="top 0"):
        model.fill_mask(["the [MASK]"], top=0)
    with pytest.raises(RecipeError, match="device 'meta'"):
        load(folders / "m2", device="meta")
