"""From a YAML recipe to a Composer training run: schema, builders, training."""
