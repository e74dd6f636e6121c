"""The shifted selective scan: a scan path is a table, and only the scan and the convolution see it."""

from boldforge.kernels.index import ScanIndex, window_index
from boldforge.kernels.ops import BackendError, available_backends, shifted_conv, shifted_scan
from boldforge.kernels.oracle import conv_oracle, scan_oracle

__all__ = [
    "ScanIndex",
    "window_index",
    "shifted_scan",
    "shifted_conv",
    "scan_oracle",
    "conv_oracle",
    "available_backends",
    "BackendError",
]
