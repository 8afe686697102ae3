import ast
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from bert import convert
from bert.checkpoint import load_original, read_state_dict
from bert.data.tokenizer import train_wordpiece
from bert.export.sources import modeling_source

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
    second = load_original(folder / "back.pt", json.loads((folder / "back.config.json").read_text()), task)
    assert torch.equal(first(*inputs).logits, second(*inputs).logits)
    # And once more from the .pt that a conversion wrote, whose configuration lies beside it.
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
    config = ("--config", folder / "config.json")
    (folder / "hf").mkdir()
    (folder / "hf" / "mine.txt").write_text("kept")
    assert run(folder / "golden.pt", folder / "hf", *config) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (folder / "hf" / "mine.txt").read_text() == "kept"
    assert run(folder / "golden.pt", folder / "hf", *config, "--overwrite") == 0
    assert not (folder / "hf" / "mine.txt").exists() and (folder / "hf" / "model.safetensors").is_file()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_result_that_differs_is_not_kept(original, capsys, monkeypatch):
    folder, _, _ = original
    write = convert.write_folder

    def wrong(path, model, tokenizer, **known):
        model.bert.embeddings.norm.bias.data += 0.1
        write(path, model, tokenizer, **known)

    monkeypatch.setattr(convert, "write_folder", wrong)
    assert run(folder / "golden.pt", folder / "hf", "--config", folder / "config.json", "--verify") == 2
    assert "differs by" in capsys.readouterr().err
    assert not (folder / "hf").exists()


def test_the_modelling_file_needs_torch_and_transformers_alone():
    modules = {"__future__"}
    for node in ast.walk(ast.parse(modeling_source())):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add((node.module or "").split(".")[0])
    standard = {"__future__", "collections", "dataclasses", "difflib", "inspect", "math", "typing"}
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
