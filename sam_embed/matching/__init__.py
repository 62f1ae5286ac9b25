"""From embeddings to matched points."""
