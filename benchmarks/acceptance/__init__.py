"""How many tokens does a target pass bring? By method, temperature, language and pair of tokenizers."""
