"""Is it faster, and where does the time go? Speed, latency, and the cost of a draft step and of a start."""
