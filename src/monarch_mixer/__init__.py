"""Monarch Mixer layers (Fu et al., NeurIPS 2023, arXiv 2310.12109): sub-quadratic in length and in width.

The layers need torch and einops only and know nothing of BERT; `monarch_mixer.reference` has the plain versions.
"""

from monarch_mixer.block_diagonal import BlockDiagonalLinear, block_diagonal_linear, block_diagonal_multiply
from monarch_mixer.dimension_mixer import DimensionMixer, gated_block_diagonal_mlp
from monarch_mixer.filters import ImplicitFilter
from monarch_mixer.long_convolution import long_convolution, short_convolution
from monarch_mixer.monarch import (
    MonarchLinear,
    dft_factors,
    monarch_convolution,
    monarch_dense,
    monarch_dense_order_p,
    monarch_dft,
    monarch_multiply,
    monarch_multiply_order_p,
    project_to_monarch,
)
from monarch_mixer.sequence_mixer import MonarchSequenceMixer, gated_long_convolution

__all__ = [
    "BlockDiagonalLinear",
    "DimensionMixer",
    "ImplicitFilter",
    "MonarchLinear",
    "MonarchSequenceMixer",
    "block_diagonal_linear",
    "block_diagonal_multiply",
    "dft_factors",
    "gated_block_diagonal_mlp",
    "gated_long_convolution",
    "long_convolution",
    "monarch_convolution",
    "monarch_dense",
    "monarch_dense_order_p",
    "monarch_dft",
    "monarch_multiply",
    "monarch_multiply_order_p",
    "project_to_monarch",
    "short_convolution",
]
