"""What is decided about proposals before vLLM's rejection sampler: blocks, stages, and the rows that are left."""
