"""Companions of the exported files: a script that builds their engines, and a README."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdet3d_quant.core.compat import removesuffix
from mmdet3d_quant.export.manifest import read_manifest
from mmdet3d_quant.export.runtimes import DEFAULT_RUNTIME, RUNTIMES
from mmdet3d_quant.export.targets import Target, target_of

#: What a file is, by stem; files of other names have their tensors to tell.
ROLES = {
    'camera.backbone': 'images and LiDAR depths to features and depth weights per camera; '
    'BEV pooling comes next, in the runtime',
    'camera.pool': "features by depth weights, summed by cell of the map; the camera's geometry is "
    'an input; OpenVINO with the operators of Intel GPUs reads it',
    'camera.vtransform': 'the pooled map to the resolution of the LiDAR map',
    'lidar.backbone.xyz': 'voxels to the LiDAR map; libspconv reads the file, nothing is built',
    'lidar.backbone.zyx': 'voxels to the LiDAR map; libspconv reads the file, nothing is built',
    'lidar.backbone': 'voxels to the LiDAR map; OpenVINO with the sparse operators of Intel GPUs '
    'reads it',
    'fuser': 'the maps of all sensors to the map of the head, with the BEV backbone and neck',
    'head.bbox': 'the map to boxes in cells, by query',
    'lidar.detector': 'the LiDAR map to what the head predicts by anchor or cell; decoding and NMS '
    'come next, in the runtime',
    'camera.detector': 'an image to what the head predicts by level; decoding and NMS come next, '
    'in the runtime',
    'volume.detector': 'the volume of image features to what the head predicts',
    **{file.name: file.role for runtime in RUNTIMES.values() for file in runtime.files},
}
#: Type and layout of inputs and outputs of engines, where a file does not say: CUDA-BEVFusion's.
IO = 'fp16:chw'
#: Names of the script and of the README.
SCRIPT, README = 'build_engines.sh', 'README.md'
#: First line of the README; one that begins otherwise is somebody else's.
TITLE = '# Exported by mmdet3d-quant'

_SCRIPT = """\
#!/usr/bin/env bash
# Written by mmdet3d-quant's tools/export_onnx.py. Builds the TensorRT engines of this folder.
set -euo pipefail

usage() {{
  cat <<'USAGE'
Usage: ./build_engines.sh [--force] [--print] [NAME ...]

Builds build/NAME.plan from NAME.onnx with trtexec, for:
  {names}
or for those named. Engines newer than their file are left alone. Build on the machine that will
run them. Logs, layer lists and the timing cache lie in build/, too.

  --force  build all anew
  --print  print the commands, run nothing

Environment:
  TRTEXEC           trtexec to use; default: trtexec, from PATH
  WORKSPACE         memory for building, MiB; default: 2048
{more}
Example:
  TRTEXEC=/usr/src/tensorrt/bin/trtexec ./build_engines.sh fuser head.bbox
USAGE
}}

cd -- "$(dirname -- "${{BASH_SOURCE[0]}}")"
trtexec=${{TRTEXEC:-trtexec}}
workspace=${{WORKSPACE:-2048}}
{plugin}force=no
print=no
wanted=()
for argument in "$@"; do
  case $argument in
    -h | --help) usage; exit 0 ;;
    --force) force=yes ;;
    --print) print=yes ;;
    {cases}) wanted+=("$argument") ;;
    *) echo "error: unknown argument $argument; see --help" >&2; exit 2 ;;
  esac
done

if [[ $print == no ]] && ! command -v "$trtexec" > /dev/null; then
  echo "error: $trtexec not found; set TRTEXEC, for example to /usr/src/tensorrt/bin/trtexec" >&2
  exit 1
fi

build() {{
  local name=$1 plan=build/$1.plan
  shift
  if [[ ${{#wanted[@]}} -gt 0 && " ${{wanted[*]}} " != *" $name "* ]]; then
    return
  fi
  local command=("$trtexec" "--onnx=$name.onnx" "$@" "--saveEngine=$plan.part"
    "--timingCacheFile=build/timing.cache" "--memPoolSize=workspace:$workspace"
    --profilingVerbosity=detailed "--exportLayerInfo=build/$name.json")
  if [[ $print == yes ]]; then
    echo "${{command[*]}}"
    return
  fi
  if [[ $force == no && $plan -nt $name.onnx ]]; then
    echo "$plan is up to date"
    return
  fi
  mkdir -p build
  echo "building $plan, which takes minutes; log: build/$name.log"
  if ! "${{command[@]}}" > "build/$name.log" 2>&1; then
    rm -f "$plan.part"
    tail -n 5 "build/$name.log" >&2
    echo "error: $plan could not be built; see build/$name.log" >&2
    exit 1
  fi
  mv -f "$plan.part" "$plan"
}}

{builds}
"""


#: Largest batch that engines of files with a dynamic one are built for; edit the script for more.
MAX_BATCH = 2


def is_built(entry: Mapping[str, Any]) -> bool:
    """Whether TensorRT builds an engine of a file; libspconv reads the LiDAR encoder's itself."""
    return 'grid' not in entry


def engine_files(folder: str | Path) -> list[Path]:
    """The files of an exported folder that engines of ONNX run, sorted; not the LiDAR encoder's.

    Raises:
        ExportError: If the folder has no manifest, or a damaged one.
    """
    files = read_manifest(folder)['files']
    return [Path(folder) / name for name in sorted(files) if is_built(files[name])]


def precision_flags(entry: Mapping[str, Any], precision: str, target: Target) -> list[str]:
    """``trtexec``'s flags for the types of a file, which a target may want for Q/DQ, too."""
    wanted = target.flags_by_format and 'DequantizeLinear' in entry['nodes']
    return [*target.flags, *(f'--{name}' for name in precision.split('+') if wanted)]


def build_flags(entry: Mapping[str, Any], precision: str, target: Target) -> list[str]:
    """All flags of ``trtexec`` that depend on the file.

    Args:
        entry: Of the manifest.
        precision: Likewise: the number formats of the folder's Q/DQ pairs, joined by ``+``.
        target: What the files are for.

    Returns:
        Precision; type and layout of every input and output where the target wants to be told; the
        plugin; the range of a dynamic batch.
    """
    flags = precision_flags(entry, precision, target)
    for what in ('inputs', 'outputs') if target.formats else ():
        io = entry.get('io', target.formats)
        flags.append(f'--{what[:-1]}IOFormats=' + ','.join([io] * len(entry[what])))
    if 'CustomLayerNormalization' in entry['nodes']:
        flags.append('"--plugins=$plugin"')
    if _plugin_ops(entry):
        flags.append('"--plugins=$ops"')
    shapes = {n: v['shape'] for n, v in entry['inputs'].items()}
    if any(isinstance(s[0], str) for s in shapes.values()):
        for flag, batch in (('min', 1), ('opt', 1), ('max', MAX_BATCH)):
            sized = [f'{n}:' + 'x'.join(map(str, [batch, *s[1:]])) for n, s in shapes.items()]
            flags.append(f'--{flag}Shapes=' + ','.join(sized))
    return flags


def _plugin_ops(entry: Mapping[str, Any]) -> list[str]:
    """Operators of mmcv in a file, such as deformable convolutions."""
    return [kind for kind in entry.get('custom_ops', ()) if kind.startswith('mmcv::')]


def build_script(manifest: Mapping[str, Any]) -> str:
    """Writes the script that builds the engines of an exported folder.

    Args:
        manifest: Of the folder, with ``files``, ``target`` and ``precision``.
    """
    target = target_of(manifest['target'])
    files = {
        removesuffix(name, '.onnx'): entry
        for name, entry in manifest['files'].items()
        if is_built(entry)
    }
    builds = {n: build_flags(e, manifest['precision'], target) for n, e in files.items()}
    plugin = any('CustomLayerNormalization' in e['nodes'] for e in files.values())
    ops = any(_plugin_ops(e) for e in files.values())
    more = '  LAYERNORM_PLUGIN  default: libcustom_layernorm.so of CUDA-BEVFusion\n' * plugin
    more += '  OPS_PLUGIN        default: libmmdeploy_tensorrt_ops.so of mmdeploy\n' * ops
    return _SCRIPT.format(
        names='\n  '.join(files),
        more=more,
        plugin='plugin=${LAYERNORM_PLUGIN:-libcustom_layernorm.so}\n' * plugin
        + 'ops=${OPS_PLUGIN:-libmmdeploy_tensorrt_ops.so}\n' * ops,
        cases=' | '.join(files) or "''",
        builds='\n'.join(' '.join(['build', name, *flags]) for name, flags in builds.items()),
    )


def is_scripted(manifest: Mapping[str, Any]) -> bool:
    """Whether a folder has a script that builds its engines, which other runtimes do."""
    runtime = manifest.get('runtime', DEFAULT_RUNTIME)
    return runtime == DEFAULT_RUNTIME and target_of(manifest['target']).script


def _boxes(files: Mapping[str, Any]) -> list[str]:
    """Lines on how outputs code boxes."""
    coded = ((name, entry['boxes']) for name, entry in files.items() if 'boxes' in entry)
    return [f'\nBoxes of `{n}` are coded as `{b["coding"]}`: {b["text"]}.' for n, b in coded]


def readme(manifest: Mapping[str, Any]) -> str:
    """Writes the README of an exported folder.

    Args:
        manifest: Of the folder, with ``files``, ``target`` and ``precision``.
    """
    target = target_of(manifest['target'])
    built = is_scripted(manifest)
    rows = [f'| file | what it does | inputs | outputs |{" flags |" if built else ""}']
    rows.append('|---|---|---|---|' + ('---|' if built else ''))
    for name, entry in manifest['files'].items():
        role = ROLES.get(removesuffix(name, '.onnx'), '')
        row = f'| `{name}` | {role} | {_tensors(entry["inputs"])} | {_tensors(entry["outputs"])} |'
        if built:
            flags = ' '.join(precision_flags(entry, manifest['precision'], target))
            row += f' `{flags}` |' if flags and is_built(entry) else ' none |'
        rows.append(row)
    lines = [
        TITLE,
        '',
        f'For {manifest["target"]}, {manifest["precision"]}. `manifest.json` says the same to '
        'programs, with scales by group, layers kept float with their reasons, the config, and '
        'hashes.',
        '',
        *rows,
        *_boxes(manifest['files']),
        '',
        '## Check',
        '',
        '```bash',
        'python tools/lint_onnx.py *.onnx --allow-float  # what costs INT8 speed or accuracy',
        '```',
        '',
    ]
    if built:
        lines += [
            '## Build',
            '',
            'On the machine that will run them:',
            '',
            '```bash',
            './build_engines.sh          # build/*.plan; --help tells the rest',
            './build_engines.sh --print  # the commands of trtexec',
            '```',
            '',
            *(_TYPED if target.strong else _UNTYPED),
            '',
        ]
        if any(is_built(e) and e.get('io', IO) == IO for e in manifest['files'].values()):
            lines += [
                'Engines take and return FP16 tensors in plain layout (`fp16:chw`), as',
                'CUDA-BEVFusion does: put this folder in its place under `model/`.',
                '',
            ]
    orders = {e['order'] for e in manifest['files'].values() if 'order' in e}
    if orders:
        lines += [f'Coordinates of voxels are in the order {orders.pop()}.', '']
    return '\n'.join(lines)


#: How layers get their types, for the README.
_UNTYPED = ('Files without Q/DQ are float and built in FP16, the others in INT8 and FP16.',)
_TYPED = (
    'Layers run in the types that the files say: INT8 or FP8 between Q/DQ, FP16 elsewhere, but for',
    'those of `float32` in `manifest.json`, whose numbers FP16 cannot hold.',
)


def _tensors(values: Mapping[str, Any]) -> str:
    return '<br>'.join(f'`{n}` {"x".join(map(str, v["shape"]))}' for n, v in values.items())
