"""The tokens of one vocabulary, and of a pair. Knows neither torch nor vLLM."""
