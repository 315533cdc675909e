"""A module that runs an engine in the place of a part of a detector."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from mmdet3d_quant.check.verify import nonfinite
from mmdet3d_quant.engines import Engine
from mmdet3d_quant.export.onnx import ExportError


class EnginePart(nn.Module):
    """Module that runs an engine, sample by sample, since graphs have a batch of one.

    Args:
        engine: Engine with the graph.
        name: How errors call it.
    """

    def __init__(self, engine: Engine, name: str = 'engine') -> None:
        super().__init__()
        self.engine, self.name = engine, name

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Runs the graph on every sample.

        Args:
            **inputs: Tensors (B, ...) by name of the graph's input.

        Returns:
            Dict of tensors by name of the graph's output, on the device of the inputs, float32 for
            FP16; those of the samples are joined along the first axis.

        Raises:
            ExportError: If an output is NaN or infinite.
        """
        device = next(iter(inputs.values())).device
        arrays = {name: x.detach().cpu().numpy() for name, x in inputs.items()}
        batch = len(next(iter(arrays.values())))
        samples = [self.engine({n: x[i : i + 1] for n, x in arrays.items()}) for i in range(batch)]
        for name in samples[0]:
            odd = next(filter(None, (nonfinite(self.name, name, s[name]) for s in samples)), '')
            if odd:
                raise ExportError(f'{odd}; tools/parity.py names the layer')
        return {
            name: torch.cat([_float32(sample[name]) for sample in samples]).to(device)
            for name in samples[0]
        }


def _float32(array: np.ndarray) -> Tensor:
    """Converts an output of an engine, FP16 to float32: decoders run in torch, on a CPU, too."""
    return torch.from_numpy(array.astype(np.float32) if array.dtype == np.float16 else array)
