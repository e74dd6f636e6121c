"""A fixed number of CPU threads: the order of a sum, and so its last bits, depends on how many share it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Let torch and the linear algebra below numpy, scipy and scikit-learn use so many threads inside the block."""
    before = torch.get_num_threads()
    with threadpool_limits(count):
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)
