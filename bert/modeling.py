"""M2-BERT as Hugging Face models: embeddings, encoder, heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPooling, MaskedLMOutput, SequenceClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from bert.attention import SelfAttention
from bert.configuration import M2BertConfig
from bert.masked_lm import MaskedLMRowsOutput, masked_lm_output
from monarch_mixer import BlockDiagonalLinear, DimensionMixer, ImplicitFilter, MonarchSequenceMixer
from monarch_mixer.filters import taps_for_training
from monarch_mixer.kernels.support import compute_dtype, kernels_apply
from monarch_mixer.normalization import layer_norm

# The prediction head's LayerNorm keeps this whatever the configuration says, as in the published models.
HEAD_LAYER_NORM_EPS = 1e-12


class Embeddings(nn.Module):
    """Words, token types and (where configured) absolute positions, summed and normalised."""

    def __init__(self, config: M2BertConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size, padding_idx=config.pad_token_id)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.position_embeddings = (
            nn.Embedding(config.max_position_embeddings, size) if config.use_positional_encodings else None
        )
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.for_monarch_mixer = config.monarch_mixer_sequence_mixing

    def forward(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Embed tokens (batch, length) as (batch, length, hidden)."""
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is None:
            types = self.token_type_embeddings.weight[0]
        else:
            types = self.token_type_embeddings(token_type_ids)
        hidden = words + types
        if self.position_embeddings is not None:
            if position_ids is None:
                position_ids = torch.arange(hidden.shape[1], device=hidden.device)
            hidden = hidden + self.position_embeddings(position_ids)
        if self.for_monarch_mixer:
            # The first mixer reads channels first; the baseline's layers keep the fp32 that autocast gives a LayerNorm.
            norm = self.norm
            return self.dropout(layer_norm(hidden, norm.weight, norm.bias, norm.eps, channels_first=True))
        return self.dropout(self.norm(hidden))


class M2BertLayer(nn.Module):
    """A sequence mixer, then a dimension mixer.

    Around the Monarch sequence mixer there is neither a residual nor a LayerNorm: the only skip past it is its own
    residual convolution. The attention baseline has both, as BERT does.
    """

    def __init__(self, config: M2BertConfig) -> None:
        super().__init__()
        self.sequence_mixer: nn.Module
        if config.monarch_mixer_sequence_mixing:
            self.sequence_mixer = MonarchSequenceMixer(
                config.hidden_size,
                config.long_conv_l_max,
                filter_order=config.hyena_filter_order,
                num_position_features=config.hyena_emb_dim,
                sine_frequency=config.hyena_w,
                frequency_scale=config.hyena_w_mod,
                bidirectional=config.bidirectional,
                residual_convolution=config.residual_long_conv,
                learn_positions=config.hyena_lr_pos_emb != 0,
                layer_norm=config.hyena_training_additions,
                short_convolution_centered=config.short_conv_centered,
            )
        else:
            self.sequence_mixer = SelfAttention(config)
        self.dimension_mixer = DimensionMixer(
            config.hidden_size,
            config.intermediate_size,
            num_blocks=config.monarch_mlp_nblocks if config.use_monarch_mlp else None,
            gated=config.use_glu_mlp,
            dropout=config.hidden_dropout_prob,
            layer_norm_eps=config.layer_norm_eps,
        )
        self.uses_mask = not config.monarch_mixer_sequence_mixing

    def forward(
        self,
        hidden: Tensor,
        padding: Tensor | None = None,
        channels_first: bool = False,
        cache_filters: bool = True,
        *taps: Tensor,
    ) -> Tensor:
        """Map (batch, length, hidden) to the same.

        `padding` is the attention baseline's mask (batch, length) or the Monarch mixer's real lengths (batch,); the
        others are hints (see `DimensionMixer.forward` and `MonarchSequenceMixer.forward`), which the baseline and the
        CPU ignore.
        """
        if self.uses_mask:
            return self.dimension_mixer(self.sequence_mixer(hidden, padding))
        mixed = self.sequence_mixer(hidden, taps or None, cache_filters, padding)
        return self.dimension_mixer(mixed, channels_first)


class Encoder(nn.Module):
    """The stack of layers."""

    _gradient_checkpointing_func: Callable[..., Tensor]  # set by Hugging Face when checkpointing is switched on

    def __init__(self, config: M2BertConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(M2BertLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(
        self, hidden: Tensor, padding: Tensor | None = None, output_hidden_states: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Return the last hidden states and, on demand, those before and after each layer; see `M2BertLayer`."""
        all_hidden = [hidden]
        # Layers that something wraps (FSDP) have their weights only while they run, and change them unseen.
        plain = all(type(layer) is M2BertLayer for layer in self.layers)
        taps = self._evaluate_filters(hidden) if plain else None
        for index, layer in enumerate(self.layers):
            channels_first = index + 1 < len(self.layers)  # as the next sequence mixer reads them
            arguments = (hidden, padding, channels_first, plain, *(taps[index] if taps else ()))
            if self.gradient_checkpointing and self.training:
                hidden = self._gradient_checkpointing_func(layer.__call__, *arguments)
            else:
                hidden = layer(*arguments)
            if output_hidden_states:
                all_hidden.append(hidden)
        return hidden, tuple(all_hidden) if output_hidden_states else None

    def _evaluate_filters(self, hidden: Tensor) -> list[tuple[Tensor, ...]] | None:
        """Evaluate the filters of all layers together, for the kernels in training; None where layers do it."""
        modules = [layer.sequence_mixer for layer in cast(Iterable[M2BertLayer], self.layers)]
        mixers = [module for module in modules if isinstance(module, MonarchSequenceMixer)]
        if (
            not mixers
            or not torch.is_grad_enabled()
            or not kernels_apply(hidden, compute_dtype(hidden), mixers[0].kernels_lack())
        ):
            return None
        first = mixers[0]
        filters = [implicit_filter.tensors() for mixer in mixers for implicit_filter in mixer.filters()]
        scale = first.filter.frequency_scale
        taps = taps_for_training(filters, hidden.shape[1], scale, compute_dtype(hidden)).unbind()
        each = len(first.filters())
        return [taps[start : start + each] for start in range(0, len(taps), each)]


class Pooler(nn.Module):
    """A dense layer with tanh on the first token, or on the mean of the real ones (`pool_all`)."""

    def __init__(self, config: M2BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.pool_all = config.pool_all

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Pool (batch, length, hidden) to (batch, hidden)."""
        if not self.pool_all:
            pooled = hidden[:, 0]
        elif attention_mask is None:
            pooled = hidden.mean(1)
        else:
            weights = attention_mask.to(hidden.dtype)[..., None]
            pooled = (weights * hidden).sum(1) / weights.sum(1).clamp(min=1)
        return torch.tanh(self.dense(pooled))


class PredictionHead(nn.Module):
    """From hidden rows to vocabulary logits, with the word embeddings as the last matrix."""

    def __init__(self, config: M2BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=HEAD_LAYER_NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def transform(self, hidden: Tensor) -> Tensor:
        """Return what the last matrix is applied to, shaped as `hidden` (..., hidden)."""
        return self.norm(F.gelu(self.dense(hidden)))

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        """Map (..., hidden) to (..., vocabulary)."""
        return F.linear(self.transform(hidden), word_embeddings, self.bias)


class M2BertPreTrainedModel(PreTrainedModel):
    """What all M2-BERT models share: configuration, initialisation, saving and loading."""

    config: M2BertConfig
    config_class = M2BertConfig  # type: ignore[assignment]
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    _no_split_modules = ["M2BertLayer"]  # noqa: RUF012 - the base class has a list

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Compute layers again in the backward pass, as `torch.utils.checkpoint` does by these arguments.

        Not the reentrant way unless they say so: its forward pass knows of no gradients, and on a CPU would round
        otherwise than one without checkpointing (`monarch_mixer.long_convolution`).
        """
        super().gradient_checkpointing_enable({"use_reentrant": False, **(gradient_checkpointing_kwargs or {})})

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """Say whether Composer's FSDP shards a module by itself."""
        return isinstance(module, M2BertLayer)

    def _init_weights(self, module: nn.Module) -> None:
        # Hugging Face calls this for children before their parents, so a layer's parts are drawn when the encoder is.
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(0.0, std)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(0.0, std)
        elif isinstance(module, nn.LayerNorm):
            module.weight.data.fill_(1.0)
            module.bias.data.zero_()
        elif isinstance(module, BlockDiagonalLinear | ImplicitFilter | MonarchSequenceMixer):
            module.reset_parameters()
        elif isinstance(module, PredictionHead):
            module.bias.data.zero_()
        elif isinstance(module, Encoder) and self.config.initialization == "legacy":
            _share_first_draw(module)


@torch.no_grad()
def _share_first_draw(encoder: Encoder) -> None:
    """Give every layer the first one's draw of what the original code drew once and copied into all layers.

    Those are the parameters that belong to no linear layer, embedding or LayerNorm of PyTorch's own.
    """
    own = {"short_weight", "short_bias", "skip"}
    first = dict(encoder.layers[0].named_parameters())
    shared = {name for name in first if name.rsplit(".", 1)[-1] in own}
    for name, module in encoder.layers[0].named_modules():
        if isinstance(module, BlockDiagonalLinear):
            shared |= {f"{name}.{parameter}" for parameter, _ in module.named_parameters()}
    for layer in encoder.layers[1:]:
        parameters = dict(layer.named_parameters())
        for name in shared:
            parameters[name].copy_(first[name])


class M2BertModel(M2BertPreTrainedModel):
    """The encoder with its embeddings, and a pooler where asked for."""

    def __init__(self, config: M2BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.pooler = Pooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embeddings."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings."""
        self.embeddings.word_embeddings = cast(nn.Embedding, value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        """Encode tokens.

        Args:
            input_ids: (batch, length) token ids.
            attention_mask: (batch, length), 0 at padding. With `config.mask_padding` the Monarch mixer leaves out the
                padding on the right of each row: outputs at real tokens do not depend on it. Without it padding is
                processed like any token, as in the published models: pad to the length the model was trained at.
            token_type_ids: (batch, length), default 0.
            position_ids: (batch, length) or (length,), default 0, 1, ...
            inputs_embeds: (batch, length, hidden) in place of `input_ids`.
            output_hidden_states: whether to return the embeddings and each layer's output.
            return_dict: whether to return an object (default) or a tuple.

        Raises:
            ValueError: neither or both kinds of input are given, the input is longer than the model allows, or the mask
                is not that of padding on the right, which the Monarch mixer alone minds.
        """
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give either input_ids or inputs_embeds")
        length = tokens.shape[1]
        limit = self.config.max_sequence_length
        if limit is not None and length > limit:
            raise ValueError(f"{length} tokens, but this model was made for at most {limit}")
        hidden = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        wants_hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        padding = attention_mask
        if self.config.monarch_mixer_sequence_mixing:
            mask = attention_mask if self.config.mask_padding else None
            padding = None if mask is None else real_lengths(mask)
        hidden, all_hidden = self.encoder(hidden, padding, bool(wants_hidden))
        if attention_mask is not None and not self.config.monarch_mixer_sequence_mixing:
            # The published attention baseline leaves padding out; its hidden states come back as zeros.
            hidden = hidden * attention_mask[..., None].to(hidden.dtype)
        pooled = None if self.pooler is None else self.pooler(hidden, attention_mask)
        output = BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled, hidden_states=all_hidden)
        return output if _wants_dict(self.config, return_dict) else output.to_tuple()


def real_lengths(attention_mask: Tensor) -> Tensor | None:
    """Return how many positions of each row come before the padding at its end, (batch,) in int32.

    On a GPU, where looking would wait for the device, a zero before the last one counts as real. On a CPU it is an
    error, and a mask without padding gives None.

    Args:
        attention_mask: (batch, length), of any dtype, 0 at padding.

    Raises:
        ValueError: padding comes before a real token (on a CPU, outside of compiled code).
    """
    real = attention_mask != 0
    if real.device.type == "cpu" and not torch.compiler.is_compiling():
        if real.all():
            return None
        if (real[:, 1:] & ~real[:, :-1]).any():
            raise ValueError("mask_padding wants padding on the right of each row: set the tokenizer's padding_side")
    places = torch.arange(1, real.shape[1] + 1, dtype=torch.int32, device=real.device)
    return (real * places).amax(1)


class M2BertForMaskedLM(M2BertPreTrainedModel):
    """M2-BERT with the masked-token prediction head, whose last matrix is the word embeddings."""

    def __init__(self, config: M2BertConfig) -> None:
        super().__init__(config)
        self.bert = M2BertModel(config, add_pooling_layer=False)
        self.head = PredictionHead(config)
        self.post_init()

    def predict(self, hidden: Tensor) -> Tensor:
        """Return the vocabulary logits (..., vocabulary) of hidden states (..., hidden)."""
        return self.head(hidden, self.bert.embeddings.word_embeddings.weight)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        max_masked_rows: int | None = None,
        **_: Any,
    ) -> MaskedLMOutput | MaskedLMRowsOutput | tuple:
        """Predict tokens; inputs as in `M2BertModel.forward`.

        Without `labels`: logits at all positions, (batch, length, vocabulary). With `labels` (batch, length), -100
        where there is none: the mean cross entropy over labelled positions, and logits of those alone (`row_labels`
        says whose they are), which are None on a GPU, where the loss is computed without them. `max_masked_rows` fixes
        their number (see `bert.masked_lm.select_masked_rows`).
        """
        encoded = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_hidden_states, True
        )
        output: MaskedLMOutput | MaskedLMRowsOutput
        if labels is None:
            logits = cast(torch.FloatTensor, self.predict(encoded.last_hidden_state))
            output = MaskedLMOutput(logits=logits, hidden_states=encoded.hidden_states)
        else:
            words = self.bert.embeddings.word_embeddings.weight
            output = masked_lm_output(
                encoded.last_hidden_state, labels, self.head.transform, words, self.head.bias, max_masked_rows
            )
            output.hidden_states = encoded.hidden_states
        return output if _wants_dict(self.config, return_dict) else output.to_tuple()


@dataclass
class SentenceEmbeddingOutput(ModelOutput):
    """What a model with `gather_sentence_embeddings` returns."""

    sentence_embedding: Tensor | None = None  # (batch, hidden)
    hidden_states: tuple[Tensor, ...] | None = None


class M2BertForSequenceClassification(M2BertPreTrainedModel):
    """M2-BERT with a classifier (or, with one label, a regressor) on the pooled output."""

    def __init__(self, config: M2BertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = M2BertModel(config)
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> SequenceClassifierOutput | SentenceEmbeddingOutput | tuple:
        """Classify sequences; inputs as in `M2BertModel.forward`.

        Loss with `labels` (batch,): mean squared error with one label, cross entropy with integer labels, binary cross
        entropy with float labels (batch, labels). `config.problem_type` overrides the choice.
        """
        encoded = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_hidden_states, True
        )
        output: SequenceClassifierOutput | SentenceEmbeddingOutput
        if self.config.gather_sentence_embeddings:
            embedding = encoded.last_hidden_state[:, 0] if self.config.use_cls_token else encoded.pooler_output
            if self.config.use_normalized_embeddings:
                embedding = F.normalize(embedding, dim=-1)
            output = SentenceEmbeddingOutput(sentence_embedding=embedding, hidden_states=encoded.hidden_states)
        else:
            if self.config.use_cls_token:
                logits = self.classifier(encoded.last_hidden_state[:, 0])
            else:
                logits = self.classifier(self.dropout(encoded.pooler_output))
            loss = None if labels is None else cast(torch.FloatTensor, self._loss(logits, labels))
            output = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return output if _wants_dict(self.config, return_dict) else output.to_tuple()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        problem = self.config.problem_type
        if problem is None:
            if self.num_labels == 1:
                problem = "regression"
            else:
                problem = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        if problem == "regression":
            return F.mse_loss(logits.squeeze(), labels.squeeze().to(logits.dtype))
        if problem == "single_label_classification":
            return F.cross_entropy(logits, labels.flatten())
        return F.binary_cross_entropy_with_logits(logits, labels)


def _wants_dict(config: M2BertConfig, return_dict: bool | None) -> bool:
    return config.return_dict if return_dict is None else return_dict


AutoConfig.register(M2BertConfig.model_type, M2BertConfig)
AutoModel.register(M2BertConfig, M2BertModel)
AutoModelForMaskedLM.register(M2BertConfig, M2BertForMaskedLM)
AutoModelForSequenceClassification.register(M2BertConfig, M2BertForSequenceClassification)
