"""Is the output the target's own? Laws of sampled output against counts, and repeated greedy output."""
