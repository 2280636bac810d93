"""Whether a CUDA graph is being captured."""

import torch


def capturing() -> bool:
    """Whether a CUDA graph captures the current stream, or did until an error ended the capture."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
