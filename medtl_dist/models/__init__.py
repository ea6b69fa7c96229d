"""batches → model: backbones, freezing, weights."""
