"""The model card of an exported folder: what the source says of the model, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bert.checkpoint import Model
from bert.modeling import M2BertForMaskedLM

UNSTATED = "Not stated by the source."
SECTIONS = {"data": "Data", "metrics": "Metrics", "recipe": "Recipe", "versions": "Versions"}
_OWN_CARD = "# Runs modeling_m2_bert.py of the folder."


def model_card(model: Model, has_tokenizer: bool, origin: Mapping[str, Any]) -> str:
    """Return the model card: what the source says about the model and nothing else.

    Args:
        model: the model.
        has_tokenizer: whether the folder has one.
        origin: "source" (kind of checkpoint), and where they are known "recipe" (YAML), "data" (a sentence), "metrics"
            (name -> value), "versions", "license" (an identifier), "card" (the source's own, which is quoted).
    """
    config = model.config
    masked = isinstance(model, M2BertForMaskedLM)
    auto = "AutoModelForMaskedLM" if masked else "AutoModelForSequenceClassification"
    license_name = origin.get("license")
    head = ["---", *([f"license: {license_name}"] if license_name else []), "library_name: transformers"]
    head += [f"pipeline_tag: {'fill-mask' if masked else 'text-classification'}", "tags:", "- m2-bert", "---"]
    count = sum(parameter.numel() for parameter in model.parameters())
    mixer = "Monarch Mixer" if config.monarch_mixer_sequence_mixing else "attention baseline"
    longest = config.max_sequence_length
    limit = "texts of any length" if longest is None else f"at most {longest} tokens"
    lines = [
        *head,
        "",
        "# M2-BERT",
        "",
        f"{mixer}, {count:,} parameters, {config.num_hidden_layers} layers of {config.hidden_size}, {limit} "
        f"(Fu et al., *Monarch Mixer*, NeurIPS 2023, arXiv 2310.12109). Converted "
        f"from {origin['source']}.",
        "",
        "```python",
        f"from transformers import {auto}",
        "",
        _OWN_CARD,
        f"model = {auto}.from_pretrained(folder, trust_remote_code=True)",
        "```",
        "",
    ]
    if config.monarch_mixer_sequence_mixing and not getattr(config, "mask_padding", False):
        lines += [
            "**Padding.** This model's mixer processes padding as tokens, so that a result depends on the length that "
            'a text is padded to: pad as in training (`padding="max_length"` pads to the longest). `pipeline` and '
            "sentence-transformers pad to the longest text of a batch unless told otherwise.",
            "",
        ]
    if not has_tokenizer:
        lines += ["The folder has no tokenizer: none was known or given when it was made.", ""]
    for key, title in SECTIONS.items():
        lines += [f"## {title}", "", *_section(origin.get(key), key), ""]
    weights = f"{license_name}." if license_name else UNSTATED
    lines += ["## Licence", "", f"Weights: {weights} The modelling file: Apache-2.0.", ""]
    if card := origin.get("card"):
        lines += ["## The source's card", "", *(f"> {line}".rstrip() for line in str(card).splitlines()), ""]
    return "\n".join(lines)


def read_card(folder: Path) -> dict[str, str]:
    """Return what a folder's README.md says, for the origin that `model_card` takes; empty without one.

    Of a card that `model_card` wrote that is its sections, of another one its licence and the whole of it.
    """
    try:
        text = (folder / "README.md").read_text(encoding="utf-8-sig", errors="replace")
    except OSError:
        return {}
    head = re.match(r"---\n(.*?)\n---(?:\n|$)", text, re.DOTALL)
    card = (text[head.end() :] if head else text).strip()
    license_name = re.search(r"^license:\s*(?:-\s*)?[\"']?([A-Za-z0-9.+-]+)", head[1], re.MULTILINE) if head else None
    found = {"license": license_name[1]} if license_name else {}
    if _OWN_CARD not in card:
        return {**found, **({"card": card} if card else {})}
    for key, title in SECTIONS.items():
        section = re.search(rf"^## {title}\n\n(.*?)\n\n(?=## )", card, re.DOTALL | re.MULTILINE)
        if section and section[1] != UNSTATED:
            found[key] = section[1].removeprefix("```yaml\n").removesuffix("\n```") if key == "recipe" else section[1]
    quoted = re.search(r"^## The source's card\n\n(.*)", card, re.DOTALL | re.MULTILINE)
    if quoted:
        found["card"] = re.sub(r"^> ?", "", quoted[1].strip(), flags=re.MULTILINE)
    return found


def _section(value: Any, key: str) -> list[str]:
    if not value:
        return [UNSTATED]
    if key == "recipe":
        return ["```yaml", str(value).rstrip(), "```"]
    if not isinstance(value, Mapping):
        return [str(value)]
    if key == "data":
        return [data_sentence(value)]
    shown = {name: f"{number:.6g}" if isinstance(number, float) else number for name, number in value.items()}
    return [f"- {str(name).removeprefix('metrics/eval/')}: {number}" for name, number in shown.items()]


def data_sentence(data: Mapping[str, Any]) -> str:
    """Say what a model was trained on, from a run's record: "source", and counts of documents, samples and tokens."""
    counts = [
        f"{data[name]:,} {name}" for name in ("documents", "samples", "tokens") if isinstance(data.get(name), int)
    ]
    return ": ".join([_source(data.get("source")), *([", ".join(counts)] if counts else [])]) + "."


def _source(source: Any) -> str:
    source = source if isinstance(source, Mapping) else {}
    if source.get("kind") == "hub":
        parts = [str(source[name]) for name in ("config", "split") if source.get(name)]
        return f"Hugging Face dataset {source.get('name')}" + (f" ({', '.join(parts)})" if parts else "")
    if source.get("kind") == "files":
        paths = source.get("paths")
        names = ", ".join(f"`{Path(str(path)).name}`" for path in paths) if isinstance(paths, list) else "text"
        return f"{source.get('num_files')} files ({names})"
    if source.get("kind") == "embedded":
        return f"Text that Python brings along ({source.get('split')})"
    if source.get("kind") == "streams":
        return "; ".join(_source(part) for name, part in source.items() if name != "kind")
    return f"A source of kind {source.get('kind')}"
