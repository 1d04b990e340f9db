"""What the tokens of one vocabulary mean, and how two vocabularies belong together. Knows neither torch nor vLLM."""
