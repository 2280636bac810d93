"""Whether this torch can export the functions of capsops to ONNX."""

import pytest

try:
    from torch.onnx._internal.exporter import _flags
except ImportError:
    _flags = None

# The exporter of torch 2.6 sets no flag while it runs, so it gets to see the ops, which it does not know.
needs_newer_exporter = pytest.mark.skipif(
    not hasattr(_flags, "_is_onnx_exporting"), reason="this torch's exporter is too old"
)
