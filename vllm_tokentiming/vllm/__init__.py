"""All that touches vLLM: the only folder that imports or patches it."""
