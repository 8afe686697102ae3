from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertTokenizerFast

from bert.data.tokenizer import backend_json, fingerprint, load_tokenizer, special_token_ids, train_wordpiece
from bert.data.word_cache import DocumentEncoder
from bert.errors import DataError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = [*"abcdefghijklmnopqrstuvwxyz\u03c3日é0123456789.,[]()#'", "the", "sep", "##ing", "##er"]
VOCABULARY = [*SPECIAL, *LETTERS, *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz\u03c3é0123456789")]
TEXTS = ["The interpreter returns the strings that it interprets.", "A string is a sequence of characters."] * 3


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return path


def test_one_tokenizer_in_every_form_has_one_fingerprint(vocab: Path, tmp_path: Path) -> None:
    bare = load_tokenizer(str(vocab))
    bare.save_pretrained(tmp_path / "saved")
    only_vocab = tmp_path / "only-vocab"
    only_vocab.mkdir()
    shutil.copy(vocab, only_vocab)
    forms = ["saved", "saved/tokenizer.json", "only-vocab"]
    loaded = [bare, *(load_tokenizer(str(tmp_path / form)) for form in forms)]
    assert len({fingerprint(tokenizer) for tokenizer in loaded}) == 1
    ids = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    assert [special_token_ids(tokenizer) for tokenizer in loaded] == [ids] * 4
    bare("the", truncation=True, max_length=4, padding="max_length")  # leaves its settings in the backend
    assert fingerprint(bare) == fingerprint(loaded[1])


def test_other_tokenizers_have_other_fingerprints(vocab: Path, tmp_path: Path) -> None:
    swapped = tmp_path / "vocab.txt"
    swapped.write_text("\n".join([*VOCABULARY[:-2], *reversed(VOCABULARY[-2:])]) + "\n", encoding="utf-8")
    cased = BertTokenizerFast(vocab_file=str(vocab), do_lower_case=False)
    assert len({fingerprint(t) for t in (load_tokenizer(str(vocab)), load_tokenizer(str(swapped)), cased)}) == 3


def test_a_bare_vocabulary_is_lower_cased_as_bert_base_uncased(vocab: Path) -> None:
    assert load_tokenizer(str(vocab)).tokenize("THÉ Singing") == ["the", "s", "##ing", "##ing"]


def test_a_vocabulary_with_a_word_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\na\nthe\n", encoding="utf-8")
    with pytest.raises(DataError, match="'the' is in more than one line"):
        load_tokenizer(str(tmp_path / "vocab.txt"))


def test_missing_special_tokens_are_named(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\na\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"\[SEP\], \[MASK\]"):
        load_tokenizer(str(tmp_path / "vocab.txt"))
    bare = Tokenizer(models.WordPiece(vocab={"[PAD]": 0, "[UNK]": 1, "a": 2}, unk_token="[UNK]"))
    bare.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="has no cls, sep, mask token"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_special_tokens_of_a_bare_tokenizer_json_are_found(tmp_path: Path) -> None:
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bare = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    bare.save(str(tmp_path / "roberta.json"))
    ids = special_token_ids(load_tokenizer(str(tmp_path / "roberta.json")))
    assert ids == {"cls": 0, "pad": 1, "sep": 2, "unk": 3, "mask": 4}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {"type": "Mystery"}}'])
def test_damaged_files_are_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_missing_files_are_an_error_and_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "vocab"), "no/such/vocab.txt", "./tokenizer", "data/none"):
        with pytest.raises(DataError, match="no such file or folder"):
            load_tokenizer(name)
    with pytest.raises(DataError, match=r"has no tokenizer_config\.json"):
        load_tokenizer(str(tmp_path))


def test_trained_vocabulary_is_the_same_every_time() -> None:
    tokenizer = train_wordpiece(TEXTS, 120)
    assert tokenizer.tokenize("The interpreter") == tokenizer.tokenize("the INTERPRETER")
    assert tokenizer.unk_token_id not in tokenizer("restrings")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(range(5)) == SPECIAL
    assert len(tokenizer) <= 120
    # The library's hash maps have another order in every process.
    code = f"from bert.data.tokenizer import *; print(fingerprint(train_wordpiece({TEXTS!r}, 120)))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert {fingerprint(train_wordpiece(TEXTS, 120)) for _ in range(5)} == {fingerprint(tokenizer)} == {other}


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(DataError, match="too small"):
        train_wordpiece(TEXTS, 20)


ODD_TEXT = st.lists(
    st.one_of(
        st.text(max_size=6),
        st.sampled_from([*VOCABULARY, "the", " ", "  ", "\t", "\n", "\r", "\x0b", "\x1c", "\x85", "\u2028", "\u3000"]),
        st.sampled_from(
            ["e\u0301", "\u0301", ".\u0301", "<\u0338", "ΑΣ", "İ", "\u200b", "\ufffd", "\0", "日the", "[ SEP]"]
        ),
    ),
    max_size=12,
).map("".join)


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(ODD_TEXT, max_size=3))
@pytest.mark.parametrize("lower", [True, False])
def test_documents_are_encoded_as_the_library_does(vocab: Path, texts: list[str], lower: bool) -> None:
    tokenizer = BertTokenizerFast(vocab_file=str(vocab), do_lower_case=lower)
    wanted = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert list(DocumentEncoder(backend_json(tokenizer)).encode(texts)) == wanted


def test_tokenizers_that_look_beyond_words_go_through_the_library() -> None:
    backend = Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "a": 1, "b": 2, "##b": 3, "a b": 4}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.Split(".", "removed")
    assert list(DocumentEncoder(backend.to_str()).encode(["a b.a", "ab"])) == [[4, 1], [1, 3]]
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    assert list(DocumentEncoder(backend.to_str()).encode(["a b.a"])) == [[1, 2, 0, 1]]
