"""The configuration of M2-BERT, in the field names and with the defaults of the published checkpoints."""

from __future__ import annotations

import inspect
import math
from typing import Any

from transformers import PretrainedConfig

from bert.errors import RecipeError, nearest

INITIALIZATIONS = ("per_layer", "legacy")
# Experiments of the original code that never worked as named; a checkpoint cannot depend on them.
UNSUPPORTED = ("expand_positional_embeddings", "sequence_token_planting", "attention_pooling")
# What a config.json holds besides the model's own fields: of the code that wrote it, and not taken over.
FOREIGN_FIELDS = (
    "auto_map",
    "architectures",
    "model_type",
    "transformers_version",
    "_name_or_path",
    "torch_dtype",
    "dtype",
    "tokenizer_class",
)
# Fields of the published files that chose an implementation, a setting of the optimizer, or what to do while loading.
WITHOUT_EFFECT = (
    "alibi_starting_size",
    "hyena_filter_dropout",
    "hyena_wd",
    "long_conv_kernel_learning_rate",
    "performing_BEIR_evaluation",
    "use_flash_fft",
    "use_flash_mm",
)


class M2BertConfig(PretrainedConfig):
    """What an M2-BERT is made of; a published config.json loads as it is.

    Lengths are in tokens, sizes in features. The published files' fields in WITHOUT_EFFECT are kept, no more.
    """

    model_type = "m2_bert"

    def __init__(
        self,
        vocab_size: int = 30528,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,  # attention baseline only
        intermediate_size: int = 3072,  # of each half, where the MLP is gated
        hidden_act: str = "gelu",  # the exact GELU; no other
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.0,  # attention baseline only
        max_position_embeddings: int = 128,  # rows of the position table; pads nothing
        type_vocab_size: int = 2,
        initializer_range: float = 0.02,  # standard deviation of the linear layers and embeddings
        initialization: str = "per_layer",  # "legacy" starts all layers alike in part, as the original code did
        layer_norm_eps: float = 1e-12,
        pad_token_id: int | None = 0,
        classifier_dropout: float | None = None,  # None: hidden_dropout_prob
        monarch_mixer_sequence_mixing: bool = True,  # False: the attention baseline
        attention_alibi: bool = True,  # attention baseline only: linear distance bias (ALiBi) on the scores
        mask_padding: bool = False,  # whether the mixer leaves padding out; the published models process it as tokens
        long_conv_l_max: int = 128,  # the longest sequence; the filters' grid is tied to it
        hyena_filter_order: int = 128,  # width of the filters' networks
        hyena_emb_dim: int = 5,  # position features the filters see; odd
        hyena_w: float = 10,  # initial frequency of the filters' sines
        hyena_w_mod: float = 1,  # constant factor on it
        hyena_lr_pos_emb: float = 1e-5,  # 0: the position features are not trained; otherwise without effect
        hyena_training_additions: bool = False,  # LayerNorm at the mixer's input; the published 80M has it
        bidirectional: bool = True,
        residual_long_conv: bool = True,
        short_conv_centered: bool = False,  # mixer; the published models are causal there: an experiment of ours
        use_glu_mlp: bool = True,
        use_monarch_mlp: bool = True,  # block-diagonal MLP; False: dense
        monarch_mlp_nblocks: int = 4,
        use_positional_encodings: bool = True,  # learned absolute positions
        pool_all: bool = False,  # classification: mean over real tokens instead of the first token
        use_cls_token: bool = False,  # classification: the bare first token, without pooler
        gather_sentence_embeddings: bool = False,  # classification model returns its sentence embedding
        use_normalized_embeddings: bool = False,  # ... of length 1
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        self.initializer_range = initializer_range
        self.initialization = initialization
        self.layer_norm_eps = layer_norm_eps
        self.classifier_dropout = classifier_dropout
        self.monarch_mixer_sequence_mixing = monarch_mixer_sequence_mixing
        self.attention_alibi = attention_alibi
        self.mask_padding = mask_padding
        self.long_conv_l_max = long_conv_l_max
        self.hyena_filter_order = hyena_filter_order
        self.hyena_emb_dim = hyena_emb_dim
        self.hyena_w = hyena_w
        self.hyena_w_mod = hyena_w_mod
        self.hyena_lr_pos_emb = hyena_lr_pos_emb
        self.hyena_training_additions = hyena_training_additions
        self.bidirectional = bidirectional
        self.residual_long_conv = residual_long_conv
        self.short_conv_centered = short_conv_centered
        self.use_glu_mlp = use_glu_mlp
        self.use_monarch_mlp = use_monarch_mlp
        self.monarch_mlp_nblocks = monarch_mlp_nblocks
        self.use_positional_encodings = use_positional_encodings
        self.pool_all = pool_all
        self.use_cls_token = use_cls_token
        self.gather_sentence_embeddings = gather_sentence_embeddings
        self.use_normalized_embeddings = use_normalized_embeddings
        super().__init__(pad_token_id=pad_token_id, **kwargs)
        self._validate()

    @classmethod
    def field_names(cls) -> list[str]:
        """Return the names of the model's own fields, without those every Hugging Face configuration has."""
        return [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "kwargs")]

    @classmethod
    def from_recipe(cls, values: dict[str, Any]) -> M2BertConfig:
        """Make a configuration from a recipe's `model.config`, where a key that is not a field is a mistake.

        Raises:
            RecipeError: a key is unknown, or a value impossible.
        """
        fields = cls.field_names()
        for name in values:
            if name not in fields:
                raise RecipeError(f"model.config has no '{name}': {nearest(name, fields)}")
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"model.config: {error}") from error

    @property
    def max_sequence_length(self) -> int | None:
        """The longest input in tokens; None where nothing limits it."""
        limits = []
        if self.use_positional_encodings:
            limits.append(self.max_position_embeddings)
        if self.monarch_mixer_sequence_mixing:
            limits.append(self.long_conv_l_max)
        return min(limits, default=None)

    @property
    def leaves_padding_out(self) -> bool:
        """Whether outputs at real tokens are the same however much padding follows (see docs/padding.md)."""
        return self.mask_padding or not self.monarch_mixer_sequence_mixing

    def _validate(self) -> None:
        parameters = inspect.signature(type(self).__init__).parameters
        for name in self.field_names():
            kind, _, optional = str(parameters[name].annotation).partition(" | ")
            if not _is_a(kind, value := getattr(self, name)) and not (optional and value is None):
                raise ValueError(f"{name} must be {kind}, got {value!r}")
        for name in UNSUPPORTED:
            if getattr(self, name, False):
                raise ValueError(f"{name}=True is not supported: it never worked in the original code")
        if self.hidden_act != "gelu":
            raise ValueError(f"hidden_act must be 'gelu', got '{self.hidden_act}'")
        if self.initialization not in INITIALIZATIONS:
            raise ValueError(f"initialization '{self.initialization}': {nearest(self.initialization, INITIALIZATIONS)}")
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
            "long_conv_l_max",
            "hyena_filter_order",
            "monarch_mlp_nblocks",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.monarch_mixer_sequence_mixing and (self.hyena_emb_dim < 3 or self.hyena_emb_dim % 2 == 0):
            raise ValueError(f"hyena_emb_dim must be odd and at least 3, got {self.hyena_emb_dim}")
        if self.short_conv_centered and not self.bidirectional:
            raise ValueError(
                "short_conv_centered reads the next position, which a causal model (bidirectional: false) must not"
            )
        if not self.monarch_mixer_sequence_mixing and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must divide by {self.num_attention_heads} attention heads"
            )


def _is_a(kind: str, value: Any) -> bool:
    """Say whether a value is of a field's kind; a number that is not finite is of none."""
    if kind == "int":
        return type(value) is int
    if kind == "float":
        return type(value) in (int, float) and math.isfinite(value)
    return type(value).__name__ == kind
