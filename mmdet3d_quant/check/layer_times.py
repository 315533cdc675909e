"""Times of a model's layers in OpenVINO, in a float file and in an INT8 one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmdet3d_quant.check.compare import first_of, generate_samples
from mmdet3d_quant.check.variants import find_graphs
from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.engines.openvino import OpenVINO
from mmdet3d_quant.runs.listener import Listener

#: Operators whose time is that of a layer, as OpenVINO's names end.
_KERNELS = ('Conv', 'ConvTranspose', 'Gemm', 'MatMul')


def layer_times(
    float_: Path,
    int8: Path,
    num_threads: int = 1,
    runs: int = 20,
    listener: Listener | None = None,
) -> dict[str, tuple[float, float]]:
    """Measures layers in the exported files of a float and a quantized model.

    Args:
        float_: File, or folder with files, of the float model.
        int8: The same of the quantized one.
        num_threads: CPU threads.
        runs: Runs, of which the median is taken.
        listener: Receives the progress.

    Returns:
        Seconds in INT8 and in float by name of the layer, of those that both files name.

    Raises:
        EngineError: If a file cannot be read.
        QuantError: If no layer is found.
    """
    listener = listener or Listener()
    graphs = find_graphs([float_, int8])
    times: dict[str, tuple[float, float]] = {}
    with listener.counting('Timing files', len(graphs)) as count:
        for done, variants in enumerate(graphs.values(), 1):
            before, after = (_times(path, num_threads, runs) for path in variants.values())
            times.update({name: (after[name], before[name]) for name in after if name in before})
            count(done)
    if not times:
        raise QuantError(
            f'{float_} and {int8} have no layers of the same names: give what '
            'tools/export_onnx.py wrote of this model, with --float and without'
        )
    return times


def _times(path: Path, num_threads: int, runs: int) -> Mapping[str, float]:
    engine = OpenVINO(path, num_threads, profiling=True)
    inputs = first_of(generate_samples(engine.input_shapes, 1))
    found: dict[str, float] = {}
    for layer in engine.profile(inputs, runs):
        name = layer_of(layer.name)
        if name:
            found[name] = found.get(name, 0.0) + layer.seconds
    return found


def layer_of(node: str) -> str:
    """Finds the layer that a node of an exported graph belongs to, by the scopes in its name.

    Args:
        node: Name of the node in OpenVINO's compiled graph.

    Returns:
        Dotted name of the layer, empty for a node that is no layer's kernel.

    Example:
        >>> layer_of('/img_backbone/layer1/layer1.0/conv1/Conv/WithoutBiases')
        'img_backbone.layer1.0.conv1'
        >>> layer_of('/img_backbone/relu/Relu')
        ''
    """
    scopes = [scope for scope in node.split('/') if scope and scope != 'WithoutBiases']
    reordered = not node.startswith('/') or '_/' in node  # a conversion before the kernel
    if reordered or not scopes or scopes[-1].split('_')[0] not in _KERNELS:
        return ''
    names: list[str] = []
    for scope in scopes[:-1]:
        if names and scope.startswith(f'{names[-1]}.'):  # of a container, with its name repeated
            names[-1] = scope
        else:
            names.append(scope)
    return '.'.join(names)
