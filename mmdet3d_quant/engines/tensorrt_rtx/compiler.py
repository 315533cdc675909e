"""Compiles files with NVIDIA's compiler, in processes of their own, which may crash."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from mmdet3d_quant.engines.files import EngineError
from mmdet3d_quant.engines.tensorrt_rtx.record import Compiled, read_layers, read_products

#: GPU generations that the compiler knows: Turing, Ampere (2), Ada, Blackwell (2).
SMS = ('SM75', 'SM80', 'SM86', 'SM89', 'SM120', 'SM121')
#: Those that are tried where none is named: the last three of GeForce and RTX.
DEFAULT_SMS = ('SM86', 'SM89', 'SM120')
#: Those that run FP8.
FP8_SMS = ('SM89', 'SM120', 'SM121')
INSTALL = (
    'pip install --no-deps tensorrt-rtx-cu12-libs==1.7.1.116 tensorrt-rtx-cu12-bindings==1.7.1.116'
)
_CHILD = Path(__file__).with_name('child.py')
_PACKAGE = 'tensorrt_rtx_bindings'


def is_installed() -> bool:
    """Checks whether the compiler is installed, without loading it."""
    return find_spec(_PACKAGE) is not None


def check_installed() -> None:
    """Checks that the compiler is installed.

    Raises:
        EngineError: If not; says how it is.
    """
    if not is_installed():
        raise EngineError(f'TensorRT for RTX is not installed here: {INSTALL}')


def compile_onnx(
    path: str | Path,
    sms: Sequence[str] = DEFAULT_SMS,
    timeout: float = 600,
    plan: str | Path | None = None,
) -> dict[str, Compiled]:
    """Compiles a file for GPU generations, on any machine; sizes that are open are taken as 1.

    A file that cannot be read or compiled, and one that crashes the compiler, is a result.

    Args:
        path: ONNX file.
        sms: Keys of :data:`SMS`.
        timeout: Seconds that one generation may take.
        plan: Where to keep the engine of the last generation.

    Returns:
        dict of verdicts by generation, in the order of ``sms``.

    Raises:
        EngineError: If the compiler is not installed, the file does not exist, or a generation is
            unknown.
    """
    check_installed()
    unknown = sorted(set(sms) - set(SMS))
    if unknown:
        raise EngineError(f'there is no GPU generation {unknown[0]}; there are {", ".join(SMS)}')
    path = Path(path)
    if not path.is_file():
        raise EngineError(f'{path} does not exist; make it with tools/export_onnx.py')
    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError:
        model = onnx.ModelProto()
    if not model.graph.node:
        return {sm: Compiled(sm, False, 'it is cut off, or no ONNX file') for sm in sms}
    if model.functions:
        from onnx.inliner import inline_local_functions  # of onnx 1.15

        model = inline_local_functions(model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _name_nodes(model)
        (folder / 'named.onnx').write_bytes(model.SerializeToString())
        job = dict(
            model=str(folder / 'named.onnx'),
            path=str(path),
            plan=None if plan is None else str(plan),
            answer=str(folder / 'answer.json'),
        )
        return {sm: _compile(model, dict(job, sm=sm), folder / 'job.json', timeout) for sm in sms}


def _compile(model: onnx.ModelProto, job: dict[str, Any], order: Path, timeout: float) -> Compiled:
    """Runs one job in a process of its own."""
    sm, answer = job['sm'], Path(job['answer'])
    order.write_text(json.dumps(job))
    command = [sys.executable, str(_CHILD), str(order)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return Compiled(sm, False, f'the compiler did not finish within {timeout:g} seconds')
    if done.returncode < 0:
        return Compiled(sm, False, f'the compiler crashed (signal {-done.returncode})')
    if done.returncode:
        lines = done.stderr.decode(errors='replace').strip().splitlines() or ['no message']
        return Compiled(sm, False, f'the compiler did not run: {_trim(lines[-1])}')
    found = json.loads(answer.read_text())
    answer.unlink()
    told: dict[str, Any] = {key: found[key] for key in ('seconds', 'version')}
    told['warnings'] = tuple(dict.fromkeys(_trim(text) for text in found['warnings']))
    if not found['accepted']:
        errors = [_trim(text) for text in found['errors']] or ['no message']
        return Compiled(sm, False, errors[0], **told)
    try:
        layers = read_layers(found['log'])
        if not layers:
            raise ValueError('no layers')
    except ValueError as err:
        raise EngineError(
            f'TensorRT for RTX {found["version"]} tells of its layers in a form that is not '
            f'known ({err}); take the version that is: {INSTALL}'
        ) from None
    products = read_products(model, layers)
    size = found['engine_bytes']
    return Compiled(sm, True, '', products=products, layers=layers, engine_bytes=size, **told)


def _name_nodes(model: onnx.ModelProto) -> None:
    """Names nodes that have no name, or one that others have too, so that the log tells them."""
    counts = Counter(node.name for node in model.graph.node)
    for number, node in enumerate(n for n in model.graph.node if n.op_type != 'Constant'):
        if not node.name or counts[node.name] > 1:
            name = f'{node.name or node.op_type}#{number}'
            node.name = name if name not in counts else f'{name}#{number}'


def _trim(text: str) -> str:
    """Shortens a message to one line of 300 characters."""
    return ' '.join(text.split())[:300]
