"""Copies between a device and host memory that overlap with the computation.

On CUDA, host memory is pinned and copies run in a separate stream, so that the computation waits
only where it needs a result. On a CPU they are plain copies.
"""

import torch
from torch import Tensor


class HostCopies:
    """Asynchronous copies between a device and host memory.

    A tensor may be dropped as soon as its copy has been started.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def down(self, x: Tensor) -> Tensor:
        """Return a copy of x in host memory, which is complete after wait()."""
        host = self._pinned(x, x.dtype)
        self._copy(host, x)
        return host

    def up(self, host: Tensor, x: Tensor) -> None:
        """Copy `host` into x before any operation that is started from now on.

        host: tensor in host memory, any dtype; it must not change before wait()
        x: tensor of the same shape on the device
        """
        if host.dtype != x.dtype:  # converted first: fewer bytes to copy
            host = self._pinned(host, x.dtype).copy_(host)
        self._copy(x, host)
        if self._stream:
            torch.cuda.current_stream(x.device).wait_stream(self._stream)

    def wait(self) -> None:
        """Wait until all copies are complete."""
        if self._stream:
            self._stream.synchronize()

    def _copy(self, to: Tensor, x: Tensor) -> None:
        if not self._stream:
            to.copy_(x)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            to.copy_(x, non_blocking=True)
        for tensor in (to, x):
            if tensor.is_cuda:
                tensor.record_stream(self._stream)

    def _pinned(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(like.shape, dtype=dtype, pin_memory=self._stream is not None)
