"""Records in, lines out: formats, compression, remote paths. Knows nothing of inference."""
