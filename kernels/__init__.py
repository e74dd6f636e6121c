"""The shifted selective scan: a scan path is a table, and only the scan and the convolution see it."""

from boldforge.kernels.backends import BackendError, available_backends
from boldforge.kernels.index import ScanIndex, window_index
from boldforge.kernels.index_keep import keep_tokens
from boldforge.kernels.index_packs import pack_indices
from boldforge.kernels.index_prompts import expand_prompts, strip_prompts
from boldforge.kernels.index_reverse import reverse_index
from boldforge.kernels.ops import shifted_conv, shifted_scan
from boldforge.kernels.oracle import conv_oracle, scan_oracle
from boldforge.kernels.selective_scan import selective_scan_fn

__all__ = [
    "ScanIndex",
    "window_index",
    "keep_tokens",
    "pack_indices",
    "reverse_index",
    "expand_prompts",
    "strip_prompts",
    "shifted_scan",
    "shifted_conv",
    "selective_scan_fn",
    "scan_oracle",
    "conv_oracle",
    "available_backends",
    "BackendError",
]
