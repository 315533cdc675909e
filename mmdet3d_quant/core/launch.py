"""Launching Triton kernels at little cost to the host.

Triton finds out at every launch for which types and sizes a kernel is compiled, which takes longer
than many a kernel runs. Here what it found is kept, and the compiled kernel launched at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

#: Versions of Triton whose compiled kernels are launched as below; others launch as they do.
DIRECT = ('3.6',)
_direct = '.'.join(triton.__version__.split('.')[:2]) in DIRECT and torch.cuda.is_available()
#: By kernel, device and what Triton compiles for: the compiled kernel's entry and its handles.
_known: dict[tuple, tuple] = {}
#: More shapes than this and all are looked up anew.
_MOST = 4096


def launch(kernel: Any, grid: tuple[int, ...], *args: Any) -> None:
    """Launches a kernel on the device and stream of its tensors.

    Args:
        kernel: Of ``triton.jit``.
        grid: Programs along one or two axes.
        args: All its arguments, in order; the first is a tensor.
    """
    if not _direct:
        kernel[grid](*args)
        return
    device = torch.cuda.current_device()
    own = args[0].device.index
    if own != device:
        with torch.cuda.device(own):
            launch(kernel, grid, *args)
        return
    values: list[Any] = []
    key: list[Any] = [id(kernel), device]
    for arg in args:
        if isinstance(arg, Tensor):
            place = arg.data_ptr()
            values.append(place)
            key.append((arg.dtype, place & 15))
        else:
            values.append(arg)
            key.append(arg)
    kind = tuple(key)
    found = _known.get(kind)
    if found is None or triton.knobs.runtime.launch_enter_hook.calls:
        compiled = kernel[grid](*args)
        if len(_known) > _MOST:
            _known.clear()
        _known[kind] = compiled.run, compiled.function, compiled.packed_metadata
        return
    run, function, metadata = found
    second = grid[1] if len(grid) > 1 else 1
    stream = torch._C._cuda_getCurrentRawStream(device)
    run(grid[0], second, 1, stream, function, metadata, None, None, None, *values)
