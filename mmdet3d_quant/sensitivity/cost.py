"""Estimated time and bytes of a detector by which members are float, conversions included."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmdet3d_quant.sensitivity.units import Unit


@dataclass(frozen=True)
class Rates:
    """Speed of an engine, for estimates where nothing was measured.

    Attributes:
        name: How reports call it.
        int8: Multiply-accumulates per second in INT8.
        full: The same in float.
        bandwidth: Bytes per second to and from memory.
        float_bytes: Bytes of a float value.
    """

    name: str
    int8: float
    full: float
    bandwidth: float
    float_bytes: int


#: Nominal engines by name: INT8 twice as fast as FP16, as on a Jetson AGX Orin's GPU; and a core of
#: a CPU with VNNI, four times as fast as its FP32.
RATES = {
    'gpu': Rates('nominal GPU', 42e12, 21e12, 200e9, 2),
    'cpu': Rates('nominal CPU core', 200e9, 50e9, 10e9, 4),
}


def slower(rates: Rates, times: float) -> Rates:
    """Makes an engine that takes so many times as long."""
    return replace(
        rates,
        int8=rates.int8 / times,
        full=rates.full / times,
        bandwidth=rates.bandwidth / times,
    )


@dataclass(frozen=True)
class Layer:
    """What a layer, or the quantizer of an add or a concat, works on.

    Attributes:
        sources: Names of those whose results it reads.
        tie: Key that is equal for readers with one scale.
        macs: Multiply-accumulates; 0 for joins, and where they are not known.
        weights: Values of its parameters.
        reads: Values of its input.
        writes: Values of its result.
    """

    sources: tuple[str, ...]
    tie: str
    macs: int = 0
    weights: int = 0
    reads: int = 0
    writes: int = 0


@dataclass(frozen=True)
class Total:
    """What a mix of float and INT8 costs.

    Attributes:
        seconds: Estimated, or added up from what was measured.
        bytes: Of weights, and of activations read and written.
        conversions: Passes over a tensor between INT8 and float that no layer does on its way.
    """

    seconds: float
    bytes: int
    conversions: int


class Costs:
    """Costs of all mixes of a model's members.

    Args:
        layers: Of one frame, by name, float layers too.
        members: Names of those that are INT8 unless made float.
        rates: Of the engine.
        measured: Seconds in INT8 and in float by name, of layers for which they are known. The
            others are estimated for an engine that is as much slower than ``rates``.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        members: Collection[str],
        rates: Rates,
        measured: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        self.layers, self.members, self.rates = dict(layers), set(members), rates
        known = {n: seconds for n, seconds in (measured or {}).items() if n in self.layers}
        self.measured: dict[str, tuple[float, float]] = {}
        if known:
            guess = sum(self._seconds(n, int8) for n in known for int8 in (True, False))
            self.rates = slower(rates, sum(map(sum, known.values())) / guess)
            self.measured = known
        self._readers: dict[tuple, list[str]] = {}
        for name, layer in self.layers.items():
            self._readers.setdefault(layer.sources, []).append(name)

    def total(self, floats: Collection[str] = ()) -> Total:
        """Adds up a mix.

        Args:
            floats: Members that are float.
        """
        int8 = self.members.difference(floats)
        passes = self._conversions(int8)
        seconds = sum(self._seconds(name, name in int8) for name in self.layers)
        moved = sum(passes) * (1 + self.rates.float_bytes)
        size = sum(self._bytes(name, name in int8) for name in self.layers) + moved
        return Total(seconds + moved / self.rates.bandwidth, size, len(passes))

    def of(self, unit: Unit) -> tuple[Total, Total]:
        """A unit's layers in INT8 and in float, without conversions."""
        both = []
        for int8 in (True, False):
            names = [name for name in unit.members if name in self.layers]
            seconds = sum(self._seconds(name, int8) for name in names)
            both.append(Total(seconds, sum(self._bytes(name, int8) for name in names), 0))
        return both[0], both[1]

    def _seconds(self, name: str, int8: bool) -> float:
        if name in self.measured:
            return self.measured[name][0 if int8 else 1]
        layer, rates = self.layers[name], self.rates
        work = layer.macs / (rates.int8 if int8 else rates.full)
        return max(work, self._bytes(name, int8) / rates.bandwidth)

    def _bytes(self, name: str, int8: bool) -> int:
        layer, size = self.layers[name], 1 if int8 else self.rates.float_bytes
        if not layer.weights:  # a join: what it reads is written by others
            return layer.reads * size
        return (layer.weights + layer.reads + layer.writes) * size

    def _conversions(self, int8: Collection[str]) -> list[int]:
        """Sizes of the tensors that are converted in a pass of their own.

        An INT8 layer writes INT8 in its kernel, for all readers with one scale. A tensor that a
        float layer made is rounded in a pass of its own, once per scale. One that an INT8 layer
        made, and that is read in INT8 and in float, is written twice.
        """
        passes = []
        for sources, readers in self._readers.items():
            rounded = {self.layers[n].tie: n for n in readers if n in int8}
            if not rounded:
                continue
            sizes = [self.layers[name].reads for name in rounded.values()]
            made = bool(sources) and all(source in int8 for source in sources)
            if not made:
                passes += sizes
            else:
                passes += sizes[1:]
                passes += sizes[:1] if any(n not in int8 for n in readers) else []
        return passes


def describe(
    sizes: Mapping[str, Mapping[str, Any]],
    sources: Mapping[str, Sequence[str]],
    groups: Sequence[Sequence[str]],
) -> dict[str, Layer]:
    """Joins what was counted on a frame with who reads whose results.

    Args:
        sizes: Of :meth:`mmdet3d_quant.sensitivity.measure.Bench.sizes`.
        sources: Of :class:`mmdet3d_quant.sensitivity.taylor.Taylor`.
        groups: Names of quantizers that share a scale.
    """
    tie = {name: group[0] for group in groups for name in group}
    layers = {}
    for name, size in sizes.items():
        own = f'{name}._input_quantizer' if name else '_input_quantizer'
        key = tie.get(name, tie.get(own, own))
        layers[name] = replace(Layer(tuple(sorted(sources.get(name, ()))), key), **size)
    return layers


def plain(total: Total) -> dict[str, Any]:
    """Puts a total into plain values."""
    return dict(seconds=total.seconds, bytes=total.bytes, conversions=total.conversions)
