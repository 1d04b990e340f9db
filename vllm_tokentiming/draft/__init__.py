"""The draft model on vLLM's own model code, attention backends and paged KV cache."""
