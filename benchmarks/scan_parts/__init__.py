"""Parts of benchmarks/scan.py: its peers and its clock."""
