"""Embeddings of volumes: made, stored compactly, read, imported."""
