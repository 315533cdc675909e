"""How much of the activations the fixed ranges cut off while a model is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmdet3d_quant.calibration.health import MOST_CLIPPED
from mmdet3d_quant.calibration.histogram import flat
from mmdet3d_quant.calibration.observe import activation_quantizers

#: Values of a tensor that are looked at, spread evenly over it.
_SAMPLE = 2**17
#: Layers that a message names.
_SHOWN = 5


class Clipping:
    """Measures, for one forward pass at a time, what fixed ranges of activations clip.

    Between :meth:`start` and :meth:`stop` quantizers have hooks, which changes neither values nor
    gradients; at other times there is nothing. A quantizer is told of again only when its share
    has doubled.

    Args:
        model: A calibrated model.
    """

    def __init__(self, model: nn.Module) -> None:
        found = activation_quantizers(model)
        self._fixed = {name: q for name, q in found.items() if not q.learned}
        self._handles: list[Any] = []
        self._counts: dict[str, list[Tensor]] = {}
        self._known: dict[str, float] = {}

    def start(self) -> None:
        """Looks at what the quantizers read from now on."""
        self.stop()
        for name, quantizer in self._fixed.items():
            if quantizer.mode == 'quant':
                self._handles.append(quantizer.register_forward_pre_hook(self._look(name)))

    def _look(self, name: str) -> Any:
        @torch.no_grad()
        def look(quantizer: Any, args: tuple) -> None:
            values = flat(args[0].detach())
            # An odd step: sizes of rows are mostly even, and it visits all columns.
            sample = values[:: values.numel() // _SAMPLE | 1]
            if sample.numel():
                clipped = (sample.abs() > quantizer._amax).float().mean()
                self._counts.setdefault(name, []).append(clipped)

        return look

    def stop(self) -> dict[str, float]:
        """Ends looking.

        Returns:
            Share of the values beyond the range, 0 to 1, by name of the quantizer.
        """
        for handle in self._handles:
            handle.remove()
        counts, self._handles, self._counts = self._counts, [], {}
        if not counts:
            return {}
        shares = torch.stack([torch.stack(parts).mean() for parts in counts.values()])
        return dict(zip(counts, shares.tolist()))  # one look at a GPU

    def message(self) -> str | None:
        """Ends looking, and says which quantizers clip more than they should, if any do."""
        shares = self.stop()
        found = {
            name: share
            for name, share in sorted(shares.items(), key=lambda item: -item[1])
            if share > max(MOST_CLIPPED, 2 * self._known.get(name, 0.0))
        }
        if not found:
            return None
        self._known.update(found)
        shown = ', '.join(f'{n} {share:.1%}' for n, share in list(found.items())[:_SHOWN])
        more = f' and {len(found) - _SHOWN} more' if len(found) > _SHOWN else ''
        return (
            f'fixed ranges clip more than {MOST_CLIPPED:.0%} of the values that these quantizers '
            f'read: {shown}{more}. Channels that were still when the model was calibrated may '
            'have come to life. Train the ranges (learn_amax=True on the models), or calibrate '
            'the trained weights again with tools/calibrate.py'
        )
