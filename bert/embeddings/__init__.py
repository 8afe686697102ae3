"""Contrastive fine-tuning: from a masked language model to a model of embeddings."""
