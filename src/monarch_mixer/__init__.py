"""Monarch Mixer layers (Fu et al., NeurIPS 2023, arXiv 2310.12109)."""
