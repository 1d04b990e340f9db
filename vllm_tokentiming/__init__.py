"""Lossless speculative decoding in vLLM for models that do not share a vocabulary."""
