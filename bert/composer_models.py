"""ComposerModel wrappers: masked language modelling with loss and metrics on masked rows, and what a step costs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from composer.models import ComposerModel
from torch import Tensor, nn
from torchmetrics import Metric
from transformers import BertConfig, BertForMaskedLM
from transformers.models.bert.modeling_bert import BertLayer

from bert.configuration import M2BertConfig
from bert.errors import RecipeError, nearest
from bert.masked_lm import MaskedLMRowsOutput, masked_lm_output, row_bound
from bert.modeling import M2BertForMaskedLM

# Widths that divide by this keep tensor cores busy; the published models round the vocabulary up to it.
VOCABULARY_MULTIPLE = 8

Network = TypeVar("Network", bound=nn.Module)


def gather_scalars(value: Tensor, group: Any = None) -> list[Tensor]:
    """Return the scalar of each rank; unlike torchmetrics' own, without a barrier, for which the host would wait."""
    values = value.new_zeros(torch.distributed.get_world_size(group))
    values[torch.distributed.get_rank(group)] = value
    torch.distributed.all_reduce(values, group=group)
    return list(values.unbind())


class MaskedCrossEntropy(Metric):
    """Mean cross entropy over all masked tokens, in nats."""

    full_state_update = False
    cross_entropy_sum: Tensor
    num_masked: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(dist_sync_fn=gather_scalars, **kwargs)
        self.add_state("cross_entropy_sum", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_masked", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, outputs: Mapping[str, Tensor]) -> None:
        """Add a batch's outputs (see `MaskedLanguageModel.forward`)."""
        self.cross_entropy_sum += outputs["cross_entropy_sum"]
        self.num_masked += outputs["num_masked"]

    def compute(self) -> Tensor:
        """Return the mean; 0 where nothing was masked."""
        return self.cross_entropy_sum / self.num_masked.clamp(min=1)


class MaskedPerplexity(MaskedCrossEntropy):
    """Exponential of the mean cross entropy over all masked tokens."""

    def compute(self) -> Tensor:
        """Return the perplexity."""
        return super().compute().exp()


class MaskedAccuracy(Metric):
    """Fraction of masked tokens whose most likely prediction is right."""

    full_state_update = False
    num_correct: Tensor
    num_masked: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(dist_sync_fn=gather_scalars, **kwargs)
        self.add_state("num_correct", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("num_masked", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, outputs: Mapping[str, Tensor]) -> None:
        """Add a batch's outputs (see `MaskedLanguageModel.forward`)."""
        self.num_correct += outputs["num_correct"]
        self.num_masked += outputs["num_masked"]

    def compute(self) -> Tensor:
        """Return the fraction; 0 where nothing was masked."""
        return self.num_correct / self.num_masked.clamp(min=1)


class HuggingFaceBert(BertForMaskedLM):
    """Hugging Face's BERT with its head on masked rows only, as in the other models."""

    def predict(self, hidden: Tensor) -> Tensor:
        """Return the vocabulary logits (..., vocabulary) of hidden states (..., hidden)."""
        return self.cls(hidden)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, max_masked_rows: int | None = None
    ) -> MaskedLMRowsOutput:
        """Return the loss over the labelled positions, as `M2BertForMaskedLM.forward` does."""
        hidden = self.bert(input_ids, attention_mask=attention_mask)[0]
        head = self.cls.predictions
        decoder = head.decoder
        return masked_lm_output(hidden, labels, head.transform, decoder.weight, decoder.bias, max_masked_rows)

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """Say whether Composer's FSDP shards a module by itself."""
        return isinstance(module, BertLayer)


class MaskedLanguageModel(ComposerModel):
    """Any encoder with a prediction head, trained on masked tokens: the head runs on masked rows only."""

    def __init__(
        self,
        model: M2BertForMaskedLM | HuggingFaceBert,
        *,
        train_mask_rate: float,
        eval_mask_rate: float,
    ) -> None:
        """Wrap a model.

        Args:
            model: the model; with labels it returns a `MaskedLMRowsOutput`.
            train_mask_rate: fraction of tokens masked in training; bounds the rows the head is given on a GPU.
            eval_mask_rate: the same in evaluation.
        """
        super().__init__()
        self.model = model
        self.mask_rates = {True: train_mask_rate, False: eval_mask_rate}

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return loss (mean over masked rows), cross_entropy_sum, num_masked and num_correct, all scalars."""
        labels = batch["labels"]
        max_rows = None
        if torch.compiler.is_compiling() or labels.device.type != "cpu":
            max_rows = row_bound(labels.numel(), self.mask_rates[self.training])
        output = self.model(
            input_ids=batch["input_ids"],
            attention_mask=batch.get("attention_mask"),
            labels=labels,
            max_masked_rows=max_rows,
        )
        num_masked = output.num_masked
        return {
            "loss": output.loss,
            "cross_entropy_sum": output.loss.detach().float() * num_masked,
            "num_masked": num_masked,
            "num_correct": output.num_correct,
        }

    def loss(self, outputs: Mapping[str, Tensor], batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss computed in `forward`."""
        return outputs["loss"]

    def eval_forward(self, batch: Any, outputs: Mapping[str, Tensor] | None = None) -> Mapping[str, Tensor]:
        """Return the outputs of an evaluation batch (or those of the training step, for its metrics)."""
        return self.forward(batch) if outputs is None else outputs

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        """Return new metrics by name."""
        metrics: list[Metric] = [MaskedCrossEntropy(), MaskedPerplexity(), MaskedAccuracy()]
        return {type(metric).__name__: metric for metric in metrics}

    def update_metric(self, batch: Any, outputs: Mapping[str, Tensor], metric: Metric) -> None:
        """Add a batch's outputs to a metric."""
        metric.update(outputs)

    def flops_per_batch(self, batch: Mapping[str, Any]) -> float:
        """Return the operations of a training step on this batch, three times those of its forward pass."""
        num_sequences, length = batch["input_ids"].shape
        return 3 * num_sequences * length * forward_flops_per_token(self, length)


def build_masked_lm(
    name: str, config: Mapping[str, Any], *, train_mask_rate: float, eval_mask_rate: float
) -> MaskedLanguageModel:
    """Build the model a recipe names.

    Args:
        name: "m2_bert", "attention_bert" (the same with self-attention for the sequence mixer) or "hf_bert" (Hugging
            Face's BERT).
        config: fields of the model's configuration: M2BertConfig's, or BertConfig's for "hf_bert".
        train_mask_rate: fraction of tokens masked in training.
        eval_mask_rate: fraction of tokens masked in evaluation.

    Raises:
        RecipeError: the name or a field is unknown, or a value impossible.
    """
    fields = model_config(name, config)
    model = instantiate(MODELS[name], fields)
    return MaskedLanguageModel(model, train_mask_rate=train_mask_rate, eval_mask_rate=eval_mask_rate)


def instantiate(model: Callable[[Any], Network], config: M2BertConfig | BertConfig) -> Network:
    """Make a model of its configuration; RecipeError for values that only the model itself finds impossible."""
    try:
        return model(config)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"model.config: {error}") from error


def model_config(name: str, config: Mapping[str, Any]) -> M2BertConfig | BertConfig:
    """Return the configuration that a recipe's `model` section describes; errors as in `build_masked_lm`."""
    if name not in MODELS:
        raise RecipeError(f"model.name '{name}' is unknown: {nearest(name, MODELS)}")
    if name == "hf_bert":
        return _hf_bert_config(config)
    monarch = name == "m2_bert"
    if config.get("monarch_mixer_sequence_mixing", monarch) is not monarch:
        raise RecipeError("model.config.monarch_mixer_sequence_mixing contradicts model.name; leave it out")
    fields = M2BertConfig.from_recipe({**config, "monarch_mixer_sequence_mixing": monarch})
    fields.vocab_size = padded_vocab_size(fields.vocab_size)
    return fields


def bert_fields() -> list[str]:
    """Return the names of BertConfig's own fields, without those every Hugging Face configuration has."""
    return [name for name in inspect.signature(BertConfig.__init__).parameters if name not in ("self", "kwargs")]


def _hf_bert_config(config: Mapping[str, Any]) -> BertConfig:
    fields = bert_fields()
    for name in config:
        if name not in fields:
            raise RecipeError(f"model.config has no '{name}': {nearest(name, fields)}")
    try:
        return BertConfig(**config)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"model.config: {error}") from error


MODELS: dict[str, Callable[[Any], M2BertForMaskedLM | HuggingFaceBert]] = {
    "m2_bert": M2BertForMaskedLM,
    "attention_bert": M2BertForMaskedLM,
    "hf_bert": HuggingFaceBert,
}


def padded_vocab_size(vocab_size: int) -> int:
    """Return the vocabulary size rounded up to a multiple of 8, as the published models have it."""
    return math.ceil(vocab_size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def forward_flops_per_token(model: MaskedLanguageModel, length: int) -> float:
    """Return the operations (a multiplication and an addition count as two) of a forward pass, per token.

    Counted: linear maps, long convolutions as FFTs of twice the length, attention scores and their use, and the
    prediction head on the fraction of tokens masked in training. Not counted: embeddings, LayerNorms, activations, and
    the filters' networks, which run once a step whatever the batch.

    Args:
        model: the wrapped model.
        length: length of the sequences in tokens.
    """
    config = model.model.config
    width = config.hidden_size
    if isinstance(config, M2BertConfig):
        layer = 2.0 * _dimension_mixer_weights(config)
        if config.monarch_mixer_sequence_mixing:
            convolutions = 2 if config.residual_long_conv else 1
            layer += 2 * 4 * width**2 + 2 * 3 * 3 * width + convolutions * width * fft_convolution_flops(length)
        else:
            layer += 2 * 4 * width**2 + 4 * length * width
    else:
        layer = 2 * 4 * width**2 + 4 * length * width + 2 * 2 * width * config.intermediate_size
    head = 2 * width * (width + config.vocab_size)
    return config.num_hidden_layers * layer + model.mask_rates[True] * head


def _dimension_mixer_weights(config: M2BertConfig) -> int:
    width = config.hidden_size
    inner = (2 if config.use_glu_mlp else 1) * config.intermediate_size
    if not config.use_monarch_mlp:
        return width * inner + config.intermediate_size * width
    blocks = config.monarch_mlp_nblocks

    def weights(inputs: int, outputs: int) -> int:
        return blocks * math.ceil(inputs / blocks) * math.ceil(outputs / blocks)

    return weights(width, inner) + weights(config.intermediate_size, width)


def fft_convolution_flops(length: int) -> float:
    """Operations per token and channel: a real FFT of 2 * length points, its inverse, and the product between."""
    points = 2 * length
    transform = 2.5 * points * math.log2(points)
    return (2 * transform + 6 * length) / length
