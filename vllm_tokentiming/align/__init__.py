"""Which draft tokens are which target tokens. Knows neither torch nor vLLM."""
