"""A table per architecture of transformers: a file named as the model type, with `ARCHITECTURE`."""
