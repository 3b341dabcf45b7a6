"""Copies between a device and the host's memory, beside the computation.

On CUDA the host's memory is pinned and copies run in a stream of their own: nobody waits for them
before their result is needed. On a CPU they are plain copies.
"""

import torch
from torch import Tensor


class Lane:
    """The way to the host and back. Tensors may be dropped as soon as they are on it."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def down(self, x: Tensor) -> Tensor:
        """x, as the computation so far leaves it, in host memory: there after wait()."""
        host = self._pinned(x, x.dtype)
        self._copy(host, x)
        return host

    def up(self, host: Tensor, x: Tensor) -> None:
        """Into x, for whatever the device is told from now on. `host` may change after wait()."""
        if host.dtype != x.dtype:  # half the bytes on the way
            host = self._pinned(host, x.dtype).copy_(host)
        self._copy(x, host)
        if self._stream:
            torch.cuda.current_stream(x.device).wait_stream(self._stream)

    def wait(self) -> None:
        """Until all copies are done."""
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
