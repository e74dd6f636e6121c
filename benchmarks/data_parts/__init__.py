"""The parts of ``benchmarks/data.py``: the datasets and peers, what is timed, and what is killed or damaged."""
