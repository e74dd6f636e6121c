"""What benchmarks/pretrain.py measures."""
