"""What all benchmarks write down."""
