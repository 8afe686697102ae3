"""M2-BERT: models, data, recipes and tools built on the Monarch Mixer layers."""
