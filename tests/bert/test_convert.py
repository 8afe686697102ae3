import ast
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from bert import convert
from bert.checkpoint import load_original, read_state_dict, to_original
from bert.configuration import M2BertConfig
from bert.data.tokenizer import train_wordpiece
from bert.errors import CheckpointError
from bert.export.card import model_card, read_card
from bert.export.folder import load_exported
from bert.export.sources import modeling_source
from bert.glue.model import Start, build_classifier, save_finetuned
from bert.modeling import M2BertForMaskedLM

CASES = {"tiny_a": "mlm", "tiny_b": "classification"}
TEXTS = ["the cat sat on the mat", "a dog ran to the cat", "the mat is on the floor"] * 20


@pytest.fixture(params=CASES)
def original(request, goldens, tmp_path):
    """A golden as a Composer checkpoint of the original code, with its configuration; its task and inputs."""
    config, tensors, weights = goldens(request.param)
    state = {f"model.{name}": value for name, value in load_file(weights).items()}
    torch.save({"state": {"model": state}}, tmp_path / "golden.pt")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path, CASES[request.param], (tensors["in.input_ids"], tensors["in.attention_mask"])


def run(*arguments):
    return convert.main([str(argument) for argument in arguments])


def test_goldens_come_back_bit_for_bit(original, capsys):
    folder, task, inputs = original
    assert run(folder / "golden.pt", folder / "hf", "--config", folder / "config.json", "--verify") == 0
    assert "largest difference" in capsys.readouterr().out
    assert run(folder / "hf", folder / "back.pt", "--verify") == 0
    before, after = read_state_dict(folder / "golden.pt"), read_state_dict(folder / "back.pt")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value) and after[name].dtype == value.dtype, name
    first = load_original(folder / "golden.pt", json.loads((folder / "config.json").read_text()), task)
    second = load_original(folder / "back.pt", {}, task)
    assert torch.equal(first(*inputs).logits, second(*inputs).logits)
    # And once more from the .pt that a conversion wrote, which holds its configuration.
    assert run(folder / "back.pt", folder / "again") == 0
    assert (folder / "again" / "config.json").read_text() == (folder / "hf" / "config.json").read_text()


def test_a_published_folder_is_read(original):
    folder, _, _ = original
    state = read_state_dict(folder / "golden.pt")
    hub = folder / "hub"
    hub.mkdir()
    fields = json.loads((folder / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps({**fields, "model_type": "bert", "auto_map": {"AutoModel": "x.Y"}}))
    torch.save(state, hub / "pytorch_model.bin")
    assert run(hub, folder / "out", "--verify") == 0
    written = json.loads((folder / "out" / "config.json").read_text())
    assert written["model_type"] == "m2_bert" and "x.Y" not in json.dumps(written)
    state["bert.extra"] = torch.zeros(1)
    torch.save(state, hub / "pytorch_model.bin")
    assert run(hub, folder / "refused") == 2
    assert not (folder / "refused").exists()


def test_every_name_of_an_exported_folder_counts(original, capsys):
    folder, _, _ = original
    assert run(folder / "golden.pt", folder / "hf", "--config", folder / "config.json") == 0
    state = load_file(folder / "hf" / "model.safetensors")
    name = "bert.encoder.layers.1.dimension_mixer.output.bias"
    for changed, message in (({**state, "odd": torch.zeros(1)}, "odd"), ({**state}, name)):
        if message == name:
            del changed[name]
        save_file(changed, folder / "hf" / "model.safetensors")
        assert run(folder / "hf", folder / "back.pt") == 2
        assert message in capsys.readouterr().err
        assert not (folder / "back.pt").exists()


MODEL = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8, "hyena_filter_order": 4}
MODEL |= {"max_position_embeddings": 16, "long_conv_l_max": 16, "initializer_range": 0.2}


@pytest.fixture
def finetuned(tmp_path):
    """Return a function that writes a fine-tuning job's file and gives it back: its path and its model."""

    def write(pooling="mean", change=lambda content: None):
        model = build_classifier("m2_bert", MODEL, num_labels=3, pooling=pooling).eval()
        about = {"task": "mnli", "labels": ["yes", "maybe", "no"], "metrics": {"accuracy": 0.5}}
        save_finetuned(tmp_path / "model.pt", model, Start("m2_bert", MODEL), about)
        content = torch.load(tmp_path / "model.pt", weights_only=True)
        change(content)
        torch.save(content, tmp_path / "model.pt")
        return tmp_path / "model.pt", model.model

    return write


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_a_fine_tuned_file_keeps_its_pooling_and_its_labels(finetuned, tmp_path, capsys, pooling):
    file, model = finetuned(pooling)
    assert run(file, tmp_path / "hf", "--verify") == 0
    exported = load_exported(tmp_path / "hf", "M2BertForSequenceClassification")
    ids = torch.arange(12).reshape(2, 6)
    torch.testing.assert_close(exported(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    assert exported.config.pool_all is (pooling == "mean") and exported.config.id2label[1] == "maybe"
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "a fine-tuning job on mnli" in card and "accuracy: 0.5" in card


def test_a_fine_tuned_file_of_before_pooling_was_recorded_is_read_with_a_note(finetuned, tmp_path, capsys):
    file, _ = finetuned("first", lambda content: content["model"].pop("pooling"))
    assert run(file, tmp_path / "hf") == 0
    assert "set pool_all" in capsys.readouterr().err
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["pool_all"] is False


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["weights"], None),
        (["weights"], [torch.zeros(2)]),
        (["weights", "classifier.weight"], None),
        (["weights", "classifier.weight"], torch.tensor(1.0)),
        (["weights", "classifier.weight"], torch.zeros(3, 9)),
        (["weights", "classifier.bias"], torch.zeros(3, dtype=torch.int64)),
        (["weights", "classifier.bias"], torch.zeros(3).to_sparse()),
        (["weights", "classifier.bias"], torch.zeros(1).expand(1 << 40)),
        (["model"], None),
        (["model", "name"], "bert"),
        (["model", "name"], ["m2_bert"]),
        (["model", "config"], None),
        (["model", "config"], ["a"]),
        (["model", "config", "num_hidden_layers"], 1 << 60),
        (["model", "config", "hidden_size"], 1 << 40),
        (["model", "config", "vocab_size"], "40"),
        (["model", "config", "layer_norm_eps"], "x"),
        (["model", "config", "problem_type"], 3),
        (["metadata"], None),
        (["metadata"], "[" * 100_000),
        (["metadata"], "3"),
    ],
    ids=str,
)
def test_a_fine_tuned_file_with_odd_parts_is_one_message(finetuned, tmp_path, capsys, keys, value):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        if value is None:
            del content[keys[-1]]
        else:
            content[keys[-1]] = value

    file, _ = finetuned("mean", change)
    assert run(file, tmp_path / "hf", "--verify") == 2
    assert str(file) in capsys.readouterr().err and not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    "content",
    [
        [torch.zeros(2)],
        {1: torch.zeros(2)},
        {"bert.encoder.layers.0.x": {"weight": torch.zeros(2)}},
        {"x": torch.zeros(2, device="meta")},
        {},
        torch.zeros(2),
        "text",
        {"state": []},
        {"state": {"model": {}, "callbacks": {"RecipeRecord": {"record": "3"}}}},
        {
            "state": {
                "model": {"x": torch.zeros(1)},
                "callbacks": {"RecipeRecord": {"record": '{"model": {"name": 1}}'}},
            }
        },
        {"state": {"model": {"x": torch.zeros(1)}, "callbacks": {"RecipeRecord": {}}}},
        {"state": {"callbacks": 3}},
        {"kind": "monarch-mixer-bert fine-tuned"},
    ],
    ids=str,
)
def test_odd_files_are_one_message(tmp_path, capsys, content):
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "config.json").write_text(json.dumps(MODEL))
    for file, source in ((tmp_path / "odd.pt", tmp_path / "odd.pt"), (hub / "pytorch_model.bin", hub)):
        torch.save(content, file)
        assert run(source, tmp_path / "out") == 2
        assert str(source) in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        "[" * 100_000,
        *(
            json.dumps({**MODEL, name: value})
            for name, value in {
                "num_labels": 1 << 60,
                "num_hidden_layers": 1 << 60,
                "hidden_size": 1 << 60,
                "vocab_size": 1.5,
                "layer_norm_eps": float("nan"),
                "to_dict": 1,
                "max_sequence_length": 4,
                "id2label": 3,
                "hidden_dropout_prob": None,
                "_attn_implementation": "none",
            }.items()
        ),
    ],
    ids=lambda text: text[-40:],
)
def test_an_odd_config_json_is_one_message(tmp_path, capsys, text):
    hub = tmp_path / "hub"
    hub.mkdir()
    model = M2BertForMaskedLM(M2BertConfig(**MODEL))
    (hub / "config.json").write_text(text)
    for state in (to_original(model), {name: value.clone() for name, value in model.state_dict().items()}):
        torch.save(state, hub / "pytorch_model.bin")
        assert run(hub, tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and str(hub) in error and not (tmp_path / "out").exists()


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_that_would_run_code_is_refused(tmp_path, capsys):
    torch.save({"state": {"model": {"model.x": Harmful(tmp_path / "ran")}}}, tmp_path / "bad.pt")
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "config.json").write_text("{}")
    torch.save({"x": Harmful(tmp_path / "ran")}, hub / "pytorch_model.bin")
    for source in (tmp_path / "bad.pt", hub):
        assert run(source, tmp_path / "out") == 2
        assert "would run code" in capsys.readouterr().err
        assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_a_destination_is_not_overwritten_unasked(original, capsys):
    folder, _, _ = original
    arguments = (folder / "golden.pt", folder / "hf", "--config", folder / "config.json")
    assert run(*arguments) == 0
    (folder / "hf" / "README.md").write_text("mine")
    assert run(*arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (folder / "hf" / "README.md").read_text() == "mine"
    assert run(*arguments, "--overwrite") == 0
    assert (folder / "hf" / "README.md").read_text() != "mine" and (folder / "hf" / "model.safetensors").is_file()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "names",
    [
        ["mine.txt"],
        ["config.json", "mine.txt"],
        ["config.json", "model.safetensors", "latest-rank0.pt"],
        ["config.json", "model.safetensors", "ep0-ba10-rank0.pt"],
    ],
    ids=str,
)
def test_a_folder_that_no_conversion_wrote_is_never_replaced(original, capsys, names):
    folder, _, _ = original
    (folder / "out").mkdir()
    for name in names:
        (folder / "out" / name).write_text("kept")
    arguments = (folder / "golden.pt", folder / "out", "--config", folder / "config.json")
    for options in ((), ("--overwrite",)):
        assert run(*arguments, *options) == 2
        assert "no conversion wrote" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in (folder / "out").iterdir()} == dict.fromkeys(names, "kept")


def test_a_destination_that_is_or_holds_the_source_is_refused(original, capsys):
    """Also by another name, and where the folder that would go looks like an export."""
    folder, _, _ = original
    assert run(folder / "golden.pt", folder / "out", "--config", folder / "config.json") == 0
    assert run(folder / "out", folder / "out" / "sub" / "inner") == 0
    assert run(folder / "out", folder / "out" / "model.pt") == 0
    (folder / "link").symlink_to(folder / "out")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    for source, destination in (
        ("out", "out"),
        ("link", "out"),
        ("out", "link"),
        ("out/sub/inner", "out"),
        ("out/model.pt", "out"),
        ("out/model.pt", "link/model.pt"),
    ):
        assert run(folder / source, folder / destination, "--overwrite") == 2
        assert "is the source, or holds it: give another name" in capsys.readouterr().err
    assert run(folder / "out", folder / "out" / "model.safetensors", "--to", "original", "--overwrite") == 2
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert run(folder / "out", folder / "out" / "sub" / "inner", "--overwrite") == 0  # inside the source: no harm


@pytest.mark.parametrize(("error", "code"), [(OSError, 2), (KeyboardInterrupt, 130)])
@pytest.mark.parametrize("stop_at", [1, 2])
def test_an_overwritten_folder_is_whole_at_every_moment(original, monkeypatch, capsys, stop_at, error, code):
    """Fail, or be interrupted, at each of the renamings: the old folder has its name again, whole."""
    folder, _, _ = original
    arguments = (folder / "golden.pt", folder / "hf", "--config", folder / "config.json", "--overwrite")
    assert run(*arguments) == 0
    (folder / "hf" / "README.md").write_text("old")
    rename, calls = os.rename, []

    def stop(old, new):
        calls.append(new)
        if len(calls) == stop_at:
            raise error("no")
        rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", stop)
        capsys.readouterr()
        assert run(*arguments) == code
        *notes, last = capsys.readouterr().err.splitlines()
        assert last.startswith(("error: no", "interrupted: ")) and all(note.startswith("note: ") for note in notes)
    assert (folder / "hf" / "README.md").read_text() == "old" and (folder / "hf" / "config.json").is_file()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_kind_of_destination_is_not_replaced_by_another(original, capsys):
    folder, _, _ = original
    (folder / "model.pt").mkdir()
    assert run(folder / "golden.pt", folder / "model.pt", "--config", folder / "config.json", "--overwrite") == 2
    assert "is a folder" in capsys.readouterr().err


@pytest.mark.parametrize("batch", range(3))
def test_a_nan_in_any_batch_fails(original, capsys, monkeypatch, batch):
    folder, _, _ = original
    logits, calls = convert._logits, []

    def wrong(*arguments):
        calls.append(None)
        return logits(*arguments) * (float("nan") if len(calls) == 4 + batch else 1)

    monkeypatch.setattr(convert, "_logits", wrong)
    assert run(folder / "golden.pt", folder / "hf", "--config", folder / "config.json", "--verify") == 2
    assert "differs by nan" in capsys.readouterr().err and not (folder / "hf").exists()


def test_a_result_that_differs_is_not_kept(original, capsys, monkeypatch):
    folder, _, _ = original
    write = convert.write_folder

    def wrong(path, model, tokenizer, **known):
        model.bert.embeddings.norm.bias.data[0] += 1
        write(path, model, tokenizer, **known)

    monkeypatch.setattr(convert, "write_folder", wrong)
    assert run(folder / "golden.pt", folder / "hf", "--config", folder / "config.json", "--verify") == 2
    assert "differs by" in capsys.readouterr().err
    assert not (folder / "hf").exists()


def test_a_centered_short_convolution_is_exported_and_has_no_original(tmp_path, capsys):
    hub = tmp_path / "hub"
    model = M2BertForMaskedLM(M2BertConfig(**MODEL, short_conv_centered=True, mask_padding=True)).eval()
    model.save_pretrained(hub)
    assert run(hub, tmp_path / "hf", "--verify") == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["short_conv_centered"] is True
    exported = load_exported(tmp_path / "hf", "M2BertForMaskedLM")
    ids, mask = torch.randint(40, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 4:] = 0
    found, expected = exported(ids, mask).logits, model(ids, mask).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(exported(ids[1:, :4]).logits[0], found[1, :4], rtol=0, atol=1e-5)  # without its padding
    exported.config.short_conv_centered = False
    causal = type(exported)(exported.config).eval()
    causal.load_state_dict(exported.state_dict())
    assert (causal(ids, mask).logits - expected).abs().max() > 1e-3
    capsys.readouterr()
    for source in (hub, tmp_path / "hf"):
        assert run(source, tmp_path / "model.pt") == 2
        assert "error: short_conv_centered is this project's own" in capsys.readouterr().err
    assert not (tmp_path / "model.pt").exists()


def test_a_stale_modelling_file_is_not_run(original, tmp_path):
    """Another version's, or one that somebody changed; the folder is converted all the same, with the current file."""
    folder, task, _ = original
    assert run(folder / "golden.pt", folder / "hf", "--config", folder / "config.json") == 0
    path = folder / "hf" / "modeling_m2_bert.py"
    assert path.read_text() == modeling_source()
    kind = {"mlm": "M2BertForMaskedLM", "classification": "M2BertForSequenceClassification"}[task]
    load_exported(folder / "hf", kind)
    trace = tmp_path / "trace"
    for text in (f"open({str(trace)!r}, 'w')\n" + path.read_text(), path.read_text().replace("gelu", "relu"), ""):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="not the file that this version writes"):
            load_exported(folder / "hf", kind)
        assert run(folder / "hf", folder / "fresh", "--overwrite", "--verify") == 0
        assert (folder / "fresh" / "modeling_m2_bert.py").read_text() == modeling_source()
        assert not trace.exists()


def test_an_exported_folder_has_what_others_look_for(original):
    folder, _, _ = original
    train_wordpiece(TEXTS, 60).save_pretrained(folder / "tokenizer")
    source = (folder / "golden.pt", folder / "hf", "--config", folder / "config.json")
    assert run(*source, "--tokenizer", folder / "tokenizer") == 0
    names = {"config.json", "model.safetensors", "modeling_m2_bert.py", "README.md", "modules.json", "1_Pooling"}
    names |= {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "sentence_bert_config.json"}
    assert {path.name for path in (folder / "hf").iterdir()} == names
    readable = [path.stat().st_mode & 0o444 for path in (folder / "hf").iterdir()]
    assert len(set(readable)) == 1
    config = json.loads((folder / "hf" / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_m2_bert.M2BertModel" and "torch_dtype" not in config
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # where pipelines of transformers 4 look
    settings = json.loads((folder / "hf" / "tokenizer_config.json").read_text())
    assert "token_type_ids" in settings["model_input_names"]
    # And without a tokenizer, nothing that says there is one.
    assert run(*source, "--overwrite") == 0
    assert not {path.name for path in (folder / "hf").iterdir()} & {"modules.json", "tokenizer.json", "1_Pooling"}
    assert "tokenizer_class" not in json.loads((folder / "hf" / "config.json").read_text())


def test_the_modelling_file_needs_torch_and_transformers_alone():
    modules = {"__future__"}
    for node in ast.walk(ast.parse(modeling_source())):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add((node.module or "").split(".")[0])
    standard = {"__future__", "collections", "dataclasses", "difflib", "functools", "inspect", "math", "typing"}
    assert modules - standard == {"torch", "transformers"}
    assert "kernels" not in {node.id for node in ast.walk(ast.parse(modeling_source())) if isinstance(node, ast.Name)}


def test_the_tokenizer_and_the_card_say_what_is_known(original):
    folder, _, _ = original
    train_wordpiece(TEXTS, 60).save_pretrained(folder / "tokenizer")
    arguments = ("--config", folder / "config.json", "--tokenizer", folder / "tokenizer", "--license", "apache-2.0")
    assert run(folder / "golden.pt", folder / "hf", *arguments) == 0
    card = (folder / "hf" / "README.md").read_text()
    assert "license: apache-2.0" in card and "Not stated by the source." in card and "**Padding.**" in card
    settings = json.loads((folder / "hf" / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 16
    assert run(folder / "hf", folder / "back.pt") == 0


def test_a_tokenizer_larger_than_the_model_is_refused(finetuned, tmp_path, capsys):
    file, _ = finetuned()
    words = " ".join(f"{a}{b}" for a in "abcdefgh" for b in "abcdefgh")
    large = train_wordpiece([words] * 20, 60)
    large.save_pretrained(tmp_path / "large")
    message = f"has {len(large)} entries, the model's vocab_size is 40"
    assert run(file, tmp_path / "hf", "--tokenizer", tmp_path / "large") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "hf").exists()
    # And one that lies in the source's folder is not passed on.
    assert run(file, tmp_path / "hf") == 0
    large.save_pretrained(tmp_path / "hf")
    assert run(tmp_path / "hf", tmp_path / "out") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_original_codes_own_composer_checkpoint_comes_back_bit_for_bit(goldens, tmp_path):
    golden = goldens("tiny_a")[2].with_name("composer_checkpoint.pt")
    assert run(golden, tmp_path / "hf", "--verify") == 0  # every size is read from the weights
    assert run(tmp_path / "hf", tmp_path / "back.pt") == 0
    before, after = read_state_dict(golden), read_state_dict(tmp_path / "back.pt")
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())


def test_a_configuration_that_changes_nothing_is_said(original, capsys):
    folder, _, _ = original
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "hyena_ww": 3, "use_flash_mm": True}))
    assert run(folder / "golden.pt", folder / "hf", "--config", folder / "config.json") == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if "no field" in line]
    assert len(notes) == 1 and "'hyena_ww' is no field of a model" in notes[0] and "'hyena_w'" in notes[0]
    assert run(folder / "hf", folder / "again", "--config", folder / "config.json") == 2
    assert "--config is for an original checkpoint" in capsys.readouterr().err


def test_what_leads_transformers_to_other_weights_is_not_handed_on(original):
    folder, _, _ = original
    assert run(folder / "golden.pt", folder / "hf", "--config", folder / "config.json") == 0
    fields = json.loads((folder / "hf" / "config.json").read_text())
    elsewhere = {"transformers_weights": "../x.safetensors", "quantization_config": {"quant_method": "x"}}
    (folder / "hf" / "config.json").write_text(json.dumps({**fields, **elsewhere}))
    assert run(folder / "hf", folder / "again") == 0
    assert json.loads((folder / "again" / "config.json").read_text()) == fields


def test_a_folder_is_not_named_like_its_weights(original, capsys):
    folder, _, _ = original
    assert run(folder / "golden.pt", folder / "m2.safetensors", "--config", folder / "config.json") == 2
    assert "give the name of a folder" in capsys.readouterr().err and not (folder / "m2.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: 'mit'\n---\n# A\n\nb", {"license": "mit", "card": "# A\n\nb"}),
        ("\ufeff---\nlicense:\n- apache-2.0  # c\ntags: [x]\n---", {"license": "apache-2.0"}),
        ("# A", {"card": "# A"}),
        ("", {}),
    ],
)
def test_what_a_card_says_is_read(tmp_path, text, expected):
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert read_card(tmp_path) == expected
    model = M2BertForMaskedLM(M2BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, intermediate_size=8))
    origin = {**expected, "source": "a test", "data": "Words.", "recipe": "a: 1\n\nb: 2", "metrics": {"loss": 1.5}}
    (tmp_path / "README.md").write_text(model_card(model, True, origin), encoding="utf-8")
    read = read_card(tmp_path)
    assert read == {**expected, "data": "Words.", "recipe": "a: 1\n\nb: 2", "metrics": "- loss: 1.5"}
    (tmp_path / "again.md").write_text(model_card(model, True, {**read, "source": "a test"}), encoding="utf-8")
    assert (tmp_path / "again.md").read_text(encoding="utf-8") == (tmp_path / "README.md").read_text(encoding="utf-8")
