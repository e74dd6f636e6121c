"""Parts of benchmarks/masking.py: the cells that are trained, what they are tested on, and intervals."""
