"""The shifted selective scan: a scan path is a table, and only the scan and the convolution see it."""

from boldforge.kernels.backends import BackendError, available_backends
from boldforge.kernels.index import ScanIndex, window_index
from boldforge.kernels.ops import shifted_conv, shifted_scan
from boldforge.kernels.oracle import conv_oracle, scan_oracle
from boldforge.kernels.selective_scan import selective_scan_fn

__all__ = [
    "ScanIndex",
    "window_index",
    "shifted_scan",
    "shifted_conv",
    "selective_scan_fn",
    "scan_oracle",
    "conv_oracle",
    "available_backends",
    "BackendError",
]
