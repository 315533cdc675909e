"""Lines from facts: each function looks at one group, and touches nothing but its argument."""

from __future__ import annotations

from typing import Any, Iterator

from mmdet3d_quant.doctor.line import NOTE, OK, SLOW, WRONG, Line
from mmdet3d_quant.doctor.packages import PACKAGES, Package, fits, numbers

#: First and last Python, and first torch, with which the tests pass (docs/versions.md).
PYTHONS = (3, 8), (3, 12)
#: What an error of an import says, what is behind it, and what helps; the first that fits counts.
ERRORS = (
    ('libGL.so', 'a library of the system is missing', 'apt-get install libgl1 (or your own)'),
    ('libgthread', 'a library of the system is missing', 'apt-get install libglib2.0-0'),
    ('mmcv._ext', 'mmcv is here without its operators', ''),
    ('undefined symbol', 'it was compiled for another torch', 'install it again, without a cache'),
    ('numpy.core.multiarray', 'it was compiled for another numpy', "pip install 'numpy<2'"),
    ('_ARRAY_API', 'it was compiled for another numpy', "pip install 'numpy<2'"),
    ('libcuda.so', 'there is no NVIDIA driver', 'a GPU and its driver; others do without'),
)


def judge(facts: dict[str, Any]) -> list[Line]:
    """Judges an environment.

    Args:
        facts: Of :func:`mmdet3d_quant.doctor.facts.gather`.

    Returns:
        List of lines, by group.
    """
    groups = (_python, _packages, _torch, _sparse, _gpu, _compilers, _processor, _openvino)
    return [line for group in groups for line in group(facts)]


def _python(facts: dict[str, Any]) -> Iterator[Line]:
    version = facts['python']
    first, last = PYTHONS
    tried = f'{".".join(map(str, first))} to {".".join(map(str, last))}'
    has = numbers(version)[:2]
    status = OK if first <= has <= last else WRONG if has < first else NOTE
    says = '' if status == OK else f'the package was tried with Python {tried}'
    remedy = 'make the environment with one of these' if status == WRONG else ''
    yield Line('System', 'python', status, version, says, remedy)
    yield Line('System', 'system', OK, facts['system'])
    version = facts['versions']['mmdet3d-quant']
    yield _works(facts, 'System', 'mmdet3d-quant', 'mmdet3d_quant', version)


def _packages(facts: dict[str, Any]) -> Iterator[Line]:
    for package in PACKAGES:
        yield _package(facts, package)
    versions = facts['versions']
    twins = [n for n in ('onnxruntime', 'onnxruntime-gpu') if versions.get(n)]
    if len(twins) == 2:
        says = 'both write the same folder, and the last one installed wins'
        remedy = 'pip uninstall both, then install one'
        yield Line('Packages', 'onnxruntime twice', WRONG, ' and '.join(twins), says, remedy)


def _package(facts: dict[str, Any], package: Package) -> Line:
    """Judges whether a package is there, of a version that fits, and can be imported."""
    here = facts['imports'].get(package.module)
    names = [n for n in (package.name, *package.others) if facts['versions'].get(n)]
    version = facts['versions'][names[0]] if names else (here or {}).get('version', '')
    found = f'{version or "?"}' + (f' ({names[0]})' if names and names[0] != package.name else '')
    if here is None and not names:
        status = NOTE if package.without else WRONG
        says = f'without it {package.without}' if package.without else 'nothing works without it'
        return Line('Packages', package.name, status, 'not installed', says, package.remedy)
    if version and not fits(version, package.wanted):
        says = f'{package.wanted} is needed'
        return Line('Packages', package.name, WRONG, found, says, package.remedy)
    return _works(facts, 'Packages', package.name, package.module, found, package.remedy)


def _works(
    facts: dict[str, Any], group: str, name: str, module: str, found: str, remedy: str = ''
) -> Line:
    """Judges whether a module can be imported."""
    here = facts['imports'].get(module, dict(error='its module is not found'))
    if not here['error']:
        return Line(group, name, OK, found)
    error = ' '.join(here['error'].split())[:300]
    known = [(why, do) for text, why, do in ERRORS if text in error]
    why, do = known[0] if known else ('', '')
    says = 'cannot be imported: ' + error + (f' ({why})' if why else '')
    return Line(group, name, WRONG, found, says, do or remedy or 'mend the lines that say wrong')


def _torch(facts: dict[str, Any]) -> Iterator[Line]:
    torch = facts['imports'].get('torch', {})
    if 'threads' not in torch:
        return
    cores = facts['processor']['cores']
    threads = torch['threads']
    found = f'{threads} threads on {cores:g} cores'
    if threads > max(cores, 1):
        says = 'threads wait for each other'
        do = f'export OMP_NUM_THREADS={max(int(cores), 1)}'
        yield Line('torch', 'threads', SLOW, found, says, do)
    else:
        yield Line('torch', 'threads', OK, found)
    found = 'dynamo' if torch['dynamo'] else 'tracing'
    says = (
        'torch.onnx.export drops quantizers unless told dynamo=False; the tools and '
        'mmdet3d_quant.export are'
        if torch['dynamo']
        else ''
    )
    yield Line('torch', 'exporter', NOTE if torch['dynamo'] else OK, found, says)


def _sparse(facts: dict[str, Any]) -> Iterator[Line]:
    torch = facts['imports'].get('torch', {})
    spconv = facts['imports'].get('spconv.pytorch')
    if spconv is None or spconv['error'] or torch.get('gpus') or 'threads' not in torch:
        return
    if torch['threads'] == 1:
        yield Line('torch', 'spconv on the CPU', OK, 'one thread')
        return
    says = (
        "spconv's convolutions lose summands on a CPU with more than one thread (seen in 2.3.8). "
        'The Quant types and mmdet3d_quant.bevfusion compute them themselves; float encoders of '
        'mmdet3d do not'
    )
    found = f'{torch["threads"]} threads'
    yield Line('torch', 'spconv on the CPU', WRONG, found, says, 'export OMP_NUM_THREADS=1')


def _gpu(facts: dict[str, Any]) -> Iterator[Line]:
    torch = facts['imports'].get('torch', {})
    if 'gpus' not in torch:
        return
    if not torch['gpus']:
        yield _no_gpu(facts, torch)
        return
    for gpu in torch['gpus']:
        yield _one_gpu(gpu, torch)
    cuda = facts['imports'].get('mmcv.ops', {}).get('cuda', '')
    if cuda == 'not available':
        do = 'install mmcv again where nvcc is, with FORCE_CUDA=1 MMCV_WITH_OPS=1'
        says = 'its operators (NMS, voxels, deformable convolutions) fail on a GPU'
        yield Line('GPU', 'mmcv on the GPU', WRONG, 'compiled without CUDA', says, do)
    yield _triton(facts)


def _no_gpu(facts: dict[str, Any], torch: dict[str, Any]) -> Line:
    hidden = facts['variables'].get('CUDA_VISIBLE_DEVICES')
    if facts['driver'] and hidden is None:
        built = f'torch is built for CUDA {torch["cuda"]}' if torch['cuda'] else 'torch has no CUDA'
        do = 'install a torch that fits the driver (nvidia-smi shows its CUDA)'
        says = f'there is a driver, but torch sees no GPU; {built}'
        return Line('GPU', 'gpu', WRONG, 'none', says, do)
    says = 'the CPU calibrates, trains and scores; everything works'
    return Line('GPU', 'gpu', SLOW, 'none', says, 'a machine with an NVIDIA GPU, for large models')


def _one_gpu(gpu: dict[str, Any], torch: dict[str, Any]) -> Line:
    major, minor = gpu['sm']
    found = f'{gpu["name"]}, SM{major}{minor}, {gpu["bytes"] / 2**30:.0f} GiB'
    # A kernel runs on later GPUs of its generation; PTX is compiled for any later one.
    known = [(kind, numbers(sm)[0]) for kind, _, sm in (a.partition('_') for a in torch['archs'])]
    here = 10 * major + minor
    runs = any(sm <= here and (kind == 'compute' or sm // 10 == major) for kind, sm in known)
    if not runs:
        says = f'torch has no kernels for it, only {", ".join(torch["archs"])}'
        return Line('GPU', 'gpu', WRONG, found, says, 'install a torch for a newer CUDA')
    if (major, minor) < (7, 2):
        says = 'it has no INT8 tensor cores: engines gain little'
        return Line('GPU', 'gpu', SLOW, found, says, 'deploy on Turing, Xavier or later')
    return Line('GPU', 'gpu', OK, found)


def _triton(facts: dict[str, Any]) -> Line:
    triton = facts['imports'].get('triton')
    version = facts['versions'].get('triton') or (triton or {}).get('version', '')
    slow = 'fake quantization on the GPU takes more passes over memory'
    if triton is None or triton['error']:
        return Line('GPU', 'triton', SLOW, 'not there', slow, 'a torch for Linux brings it')
    if numbers(version)[:1] < (3,):
        return Line('GPU', 'triton', SLOW, version, slow, 'torch 2.5 or later brings Triton 3')
    if not facts['programs']['cc']:
        says = 'Triton compiles its kernels with a C compiler, and there is none'
        return Line('GPU', 'triton', WRONG, version, says, 'apt-get install gcc')
    return Line('GPU', 'triton', OK, version)


def _compilers(facts: dict[str, Any]) -> Iterator[Line]:
    path = facts['programs']['c++']
    if path:
        yield Line('Compilers', 'c++', OK, path)
    else:
        says = "torch.compile has nothing to compile with, and mmcv's operators cannot be built"
        yield Line('Compilers', 'c++', SLOW, 'none', says, 'apt-get install g++')


def _processor(facts: dict[str, Any]) -> Iterator[Line]:
    cpu = facts['processor']
    yield Line('Processor', 'processor', OK, f'{cpu["name"]}, {cpu["cores"]:g} cores')
    has = cpu['instructions']
    if has is None:
        yield Line('Processor', 'instructions', NOTE, 'not told by this system')
        return
    found = ', '.join(has) or 'none of those that matter'
    if facts['machine'] not in ('x86_64', 'AMD64'):
        yield Line('Processor', 'instructions', NOTE, found, 'speed was measured on x86 alone')
        return
    if 'avx2' not in has:
        says = 'no AVX2: INT8 on this CPU gains nothing'
        yield Line('Processor', 'instructions', SLOW, found, says, 'measure on another CPU')
        return
    yield Line('Processor', 'instructions', OK, found)
    if not {'avx512_bf16', 'amx_bf16'} & set(has):
        says = 'training with --amp computes in bfloat16, which this CPU only imitates'
        yield Line('Processor', 'bfloat16', SLOW, 'none', says, 'leave --amp out on the CPU')


def _openvino(facts: dict[str, Any]) -> Iterator[Line]:
    here = facts['imports'].get('openvino')
    has = facts['processor']['instructions']
    if here is None or here['error'] or has is None or facts['machine'] not in ('x86_64', 'AMD64'):
        return
    limit = facts['variables'].get('ONEDNN_MAX_CPU_ISA', '')
    least = limit.upper() in ('SSE41', 'AVX', 'AVX2', 'AVX512_CORE')
    found = f'ONEDNN_MAX_CPU_ISA={limit}' if least else 'as the processor has'
    if least or not {'avx_vnni', 'avx512_vnni', 'amx_int8'} & set(has):
        says = (
            'without VNNI OpenVINO adds signed INT8 products in 16 bits, which overflow: 10 to '
            '36 dB a layer'
        )
        do = (
            'load files through mmdet3d_quant.engines.OpenVINO, which keeps such layers float; '
            'leave --target openvino to CPUs with VNNI'
        )
        do = f'unset ONEDNN_MAX_CPU_ISA; or {do}' if least else do
        yield Line('Processor', 'INT8 in OpenVINO', WRONG, f'no VNNI ({found})', says, do)
    elif 'amx_int8' in has and not limit:
        yield Line('Processor', 'INT8 in OpenVINO', OK, 'AMX')
    else:
        yield Line('Processor', 'INT8 in OpenVINO', OK, 'VNNI')
