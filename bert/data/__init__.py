"""From text to masked batches: sources, tokenisation into MDS shards, streaming loaders."""
