"""Measurements of a calibrated detector with some of its quantizers float, on numbered frames."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmdet3d_quant.calibration.observe import Forward, run
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.copies import deep_copy
from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.core.macs import counting, weighted
from mmdet3d_quant.core.maps import judged_maps, relative_noise
from mmdet3d_quant.core.modes import evaluating, quantizers, set_mode
from mmdet3d_quant.layers.features import values
from mmdet3d_quant.sensitivity.boxes import Boxes, as_truth, boxes_of, labels_of, score
from mmdet3d_quant.sensitivity.taylor import taylor
from mmdet3d_quant.sensitivity.units import find_members

#: Whose boxes are the truth.
TRUTHS = ('float', 'labels')
#: Least score of a box of the float model to be a truth.
LEAST_SCORE = 0.2


class Bench:
    """Runs a model in any mix of float and quantized members; results are plain values.

    Args:
        model: Calibrated; its quantizers' modes change meanwhile.
        frames: Loads the batch of one frame by its number.
        truth: One of :data:`TRUTHS`.
        forward: See :func:`mmdet3d_quant.calibrate`.
    """

    def __init__(
        self,
        model: nn.Module,
        frames: Callable[[int], Any],
        truth: str = 'float',
        forward: Forward | None = None,
    ) -> None:
        self.model, self.frames, self.truth = model, frames, truth
        self.forward = forward or run
        self.members = find_members(model)
        self._known = quantizers(model)
        self._exact: dict[int, tuple[list[Tensor], list[Any]]] = {}
        self._batches: dict[int, Any] = {}

    def predict(self, frame: int, probes: int) -> dict[str, Any]:
        """Predicts the noise of each member on a frame.

        Returns:
            ``products`` and ``sources`` of :class:`~mmdet3d_quant.sensitivity.taylor.Taylor`.
        """
        found = taylor(self.model, self._batch(frame), self.members, probes, frame, self.forward)
        return dict(products=found.products, sources=found.sources)

    def sizes(self, frame: int) -> dict[str, dict[str, int]]:
        """Counts the work of each layer and join on a frame.

        Returns:
            By name ``macs`` (multiply-accumulates; missing if not known), ``weights``, ``reads``
            and ``writes`` (numbers of values). Layers that were not called are missing.
        """
        rows: dict[str, dict[str, int]] = {}
        layers = weighted(self.model)
        watched: dict[str, nn.Module] = {
            **layers,
            **{n: self._known[n] for n in self.members if n in self._known},
        }

        def hook(name: str) -> Any:
            def note(module: nn.Module, args: Any, output: Any) -> None:
                row = rows.setdefault(name, dict(weights=0, reads=0, writes=0))
                row['reads'] += _count(args[:1])
                if name in layers:
                    row['writes'] += _count((output,))
                    row['weights'] = sum(p.numel() for p in module.parameters(recurse=False))

            return note

        handles = [m.register_forward_hook(hook(name)) for name, m in watched.items()]
        try:
            with counting(self.model) as counted:
                self._run(frame, ())
        finally:
            for handle in handles:
                handle.remove()
        for name, macs in counted.macs.items():
            rows[name]['macs'] = macs
        return rows

    def noise(self, quantized: Collection[str], frames: Sequence[int]) -> float:
        """Measures the noise at the judged maps with only some members quantized.

        Returns:
            float, the mean of :func:`~mmdet3d_quant.core.maps.relative_noise`.
        """
        noises = []
        for frame in frames:
            maps, _ = self._run(frame, quantized)
            noises.append(relative_noise(maps, self._float(frame)[0]))
        return sum(noises) / len(noises)

    def state(self, quantized: Collection[str], frames: Sequence[int]) -> dict[str, Any]:
        """Measures noise and boxes with only some members quantized.

        Returns:
            ``noise``; ``map`` in points and ``draws``, see :func:`boxes.score`.

        Raises:
            QuantError: If the model returns no boxes, or frames have no labels where these are the
                truth.
        """
        noises, found, truth = [], [], []
        for frame in frames:
            exact, sure = self._float(frame)
            maps, output = self._run(frame, quantized) if quantized else (exact, sure)
            noises.append(relative_noise(maps, exact))
            for here, there in strict_zip(_samples(output), _samples(sure)):
                found.append(boxes_of(here))
                truth.append(self._truth(here, there))
        value, draws = score(found, truth)
        return dict(noise=sum(noises) / len(noises), map=value, draws=draws)

    def _truth(self, here: Any, exact: Any) -> Boxes:
        if self.truth == 'float':
            return as_truth(boxes_of(exact), LEAST_SCORE)
        boxes = labels_of(here)
        if boxes is None:
            raise QuantError(
                'frames of this data set come without labels (eval_ann_info): take the boxes of '
                'the float model as the truth, --truth float'
            )
        return boxes

    def _float(self, frame: int) -> tuple[list[Tensor], Any]:
        if frame not in self._exact:
            self._exact[frame] = self._run(frame, ())
        return self._exact[frame]

    def _run(self, frame: int, quantized: Collection[str]) -> tuple[list[Tensor], Any]:
        """Runs a frame; returns the judged maps and the output."""
        with set_mode(self.model, 'float'), evaluating(self.model), torch.no_grad():
            for name in quantized:
                for quantizer in self.members[name]:
                    self._known[quantizer].mode = 'quant'
            with judged_maps(self.model) as judged:
                output = self.forward(self.model, self._batch(frame))
                return [m.detach() for m in judged.returned(output)], output

    def _batch(self, frame: int) -> Any:
        if frame not in self._batches:
            self._batches[frame] = self.frames(frame)
        return deep_copy(self._batches[frame])  # a forward may change its batch


def _samples(output: Any) -> list[Any]:
    """The samples that a detector returned.

    Raises:
        QuantError: If it returned something else.
    """
    if isinstance(output, list) and all(hasattr(s, 'pred_instances_3d') for s in output):
        return output
    raise QuantError('the model returns no boxes (pred_instances_3d): measure only its maps')


def _count(tensors: Sequence[Any]) -> int:
    return sum(
        values(x).numel() for x in tensors if isinstance(x, Tensor) or hasattr(x, 'features')
    )
