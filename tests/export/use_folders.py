"""Use exported folders where this project is not installed; run by test_export.py: INPUTS.json FOLDER... OUTPUTS.pt.

Writes {folder: {check: result, or a traceback}}; tensors are on the CPU.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)


def checks(folder: str, inputs: dict[str, Any], device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    masked = json.loads(Path(folder, "config.json").read_text())["architectures"] == ["M2BertForMaskedLM"]
    auto = AutoModelForMaskedLM if masked else AutoModelForSequenceClassification
    ids, mask = (torch.tensor(inputs[name], device=device) for name in ("input_ids", "attention_mask"))
    labels = torch.tensor(inputs["labels" if masked else "classes"], device=device)

    def load(kind: Any = auto, place: str = folder) -> Any:
        return kind.from_pretrained(place, trust_remote_code=True).to(device).eval()

    @torch.inference_mode()
    def logits(model: Any) -> torch.Tensor:
        return model(input_ids=ids, attention_mask=mask).logits.cpu()

    def again() -> torch.Tensor:
        with tempfile.TemporaryDirectory() as place:
            load().save_pretrained(place)
            tokenizer().save_pretrained(place)
            pipeline("fill-mask" if masked else "text-classification", model=place, trust_remote_code=True)
            return logits(load(place=place))

    def step() -> dict[str, Any]:
        model = load()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
        return {"loss": loss.item(), "norm": torch.stack(norms).norm().item()}

    def tokenizer() -> Any:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)

    def ran() -> Any:
        if masked:
            fill = pipeline("fill-mask", model=folder, trust_remote_code=True, device=device, top_k=5)
            return [(entry["token_str"], entry["score"]) for entry in fill(inputs["masked"])]
        classify = pipeline("text-classification", model=folder, trust_remote_code=True, device=device, top_k=None)
        first, second = inputs["texts"][:2]
        found = [classify(first), classify({"text": first, "text_pair": second})]
        return [{entry["label"]: entry["score"] for entry in entries} for entries in found]

    def vectors() -> torch.Tensor:
        model = SentenceTransformer(folder, trust_remote_code=True, device=device)
        return torch.tensor(model.encode(inputs["texts"]))

    yield "logits", lambda: logits(load())
    yield "hidden", lambda: load(AutoModel)(input_ids=ids, attention_mask=mask).last_hidden_state.detach().cpu()
    yield "again", again
    yield "step", step
    yield "tokens", lambda: dict(tokenizer()(*inputs["texts"][:2]))
    yield "pipeline", ran
    yield "vectors", vectors


def main(inputs: str, *folders: str) -> None:
    for module in ("bert", "monarch_mixer", "composer"):
        assert importlib.util.find_spec(module) is None, f"{module} can be imported here"
    *folders, outputs = folders  # type: ignore[assignment]
    given = json.loads(Path(inputs).read_text())
    results: dict[str, dict[str, Any]] = {}
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for folder in folders:
            name = Path(folder).name
            for check, run in checks(folder, given[name], device):
                try:
                    result: Any = {"value": run()}
                except Exception:
                    result = {"error": traceback.format_exc()}
                results.setdefault(f"{name} {device}", {})[check] = result
    torch.save(results, outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
