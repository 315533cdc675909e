#!/usr/bin/env python
"""Export a calibrated detector to Q/DQ ONNX, one file per engine, and check that engines agree."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from agreement import verify_files
from compiler import add_options, check_generations, compile_exported
from examples import add_input_options, example_inputs
from mmengine.config import DictAction
from terminal import open_console, run_tool

from mmdet3d_quant.check.verify import Agreement
from mmdet3d_quant.core.modes import quantizers
from mmdet3d_quant.export import Cut, export_suite
from mmdet3d_quant.export.deploy import MAX_BATCH
from mmdet3d_quant.export.onnx import LAYERNORMS, WEIGHTS
from mmdet3d_quant.export.runtimes import DEFAULT_RUNTIME, RUNTIMES, target_for
from mmdet3d_quant.export.targets import require_formats, target_names, target_of
from mmdet3d_quant.runs import from_config as fc
from mmdet3d_quant.runs.provenance import provenance

EXAMPLE = r"""
examples:
  CONFIG=configs/bevfusion/bevfusion_lidar-cam_r50_voxel0075_second_secfpn_int8_nus-3d.py

  # all files, a manifest, and build_engines.sh, which makes engines of them where TensorRT is
  python tools/export_onnx.py $CONFIG int8.pth --out-dir onnx/int8

  # the same graphs without Q/DQ, from a float or a calibrated checkpoint
  python tools/export_onnx.py $CONFIG float.pth --out-dir onnx/float --float

  # for OpenVINO on a CPU: UINT8 where a tensor is never negative, twice as many steps
  python tools/export_onnx.py $CONFIG int8.pth --out-dir onnx/openvino --target openvino

  # only the head, with CUDA-BEVFusion's layer norm and FP16 weights
  python tools/export_onnx.py $CONFIG int8.pth --out-dir onnx/head --only head.bbox \
      --layernorm custom --fp16

  # INT8 weights in the files (a quarter of the size), a batch size that varies, a newer opset
  python tools/export_onnx.py $CONFIG int8.pth --out-dir onnx/small --weights int8 \
      --dynamic-batch --opset 21 --inputs generated --num-cams 6 --no-verify

  # FP8 (a config with format='fp8', docs/fp8.md), for engines of Ada and later
  python tools/export_onnx.py fp8.py fp8.pth --out-dir onnx/fp8 --target tensorrt-rtx

  # PointPillars: lidar.detector.onnx has the backbone, the neck and the head up to its predictions
  python tools/export_onnx.py pointpillars_int8.py int8.pth --out-dir onnx/pointpillars

exit code: 0; 1 with a line that says why, also if NVIDIA's compiler refuses a file
"""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config with Quant* types')
    parser.add_argument('checkpoint', help='calibrated checkpoint, from tools/calibrate.py')
    parser.add_argument('--out-dir', required=True, help='folder to write to')
    parser.add_argument('--float', action='store_true', help='leave out Q/DQ')
    parser.add_argument(
        '--target',
        choices=target_names(),
        help='generation of the engine that the files are for: tensorrt8 builds float32 files by '
        'flags (CUDA-BEVFusion); tensorrt10, tensorrt11 and tensorrt-rtx run FP16, INT8 and FP8 as '
        "the file says; openvino takes unsigned activations; default: the runtime's, which is "
        'tensorrt8 for cuda-bevfusion',
    )
    parser.add_argument(
        '--runtime',
        choices=RUNTIMES,
        default=DEFAULT_RUNTIME,
        help='what runs the engines, and so decides files, names and shapes (docs/runtimes.md); '
        'default: %(default)s',
    )
    parser.add_argument(
        '--int8-stages',
        nargs='*',
        metavar='PATTERN',
        help='layers of the sparse encoder to compute in INT8, for a runtime that leaves the '
        "choice: such as 'encoder_layers.encoder_layer[2-9]' conv_out; none: FP16 throughout; "
        'default: from encoder_layer3 on, where INT8 is faster than FP16',
    )
    parser.add_argument(
        '--only',
        nargs='+',
        default=(),
        metavar='NAME',
        help='files to write, such as fuser or lidar.backbone; default: all',
    )
    parser.add_argument(
        '--opset',
        type=int,
        help='ONNX opset, 13 to 21; default: 17; for targets that run types as the file says 19 to '
        '21, default: 19',
    )
    parser.add_argument(
        '--weights',
        choices=WEIGHTS,
        help='how quantized weights are stored: float with Q/DQ, or int8 with DQ, a quarter of the '
        'size with equal results, which older engines do not read; default: float, for targets '
        'that run types as the file says int8',
    )
    parser.add_argument(
        '--fp16',
        action='store_true',
        default=None,
        help='store the weights of files without Q/DQ in FP16; targets that run types as the file '
        'says have it anyway',
    )
    parser.add_argument(
        '--layernorm',
        choices=LAYERNORMS,
        default='standard',
        help="the head's layer norm: standard ops, or the plugin of CUDA-BEVFusion "
        '(libcustom_layernorm.so); default: %(default)s',
    )
    parser.add_argument(
        '--dynamic-batch',
        action='store_true',
        help=f'let the batch size of the files vary; build_engines.sh builds for 1 to {MAX_BATCH}',
    )
    add_input_options(parser)
    parser.add_argument(
        '--allow-custom-ops',
        action='store_true',
        help='write files with operators that ONNX lacks and engines need plugins for; files with '
        'deformable convolutions are verified, others are not, and none is compiled here',
    )
    parser.add_argument(
        '--no-verify', action='store_true', help='write the files without running them'
    )
    add_options(parser)
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='KEY=VALUE overrides of the config'
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[Agreement]:
    args = parse_args(argv)
    target = target_for(args.runtime, args.target)
    console = open_console()
    cfg = fc.read_config(args.config, args.cfg_options)
    model = fc.build_model(cfg)
    fc.load_weights(model, args.checkpoint, calibrated=not args.float)
    if not args.float:
        check_generations(model, args.compile)
        require_formats(quantizers(model), target_of(target))
    inputs, real = example_inputs(cfg, model, args, console)
    results: list[Agreement] = []

    def check(cuts: list[Cut], manifest: dict[str, Any], folder: Path) -> None:
        if not args.no_verify:
            results.extend(
                verify_files(console, folder, cuts, manifest, not args.float, real, model, inputs)
            )

    _, manifest = export_suite(
        model,
        inputs,
        args.out_dir,
        provenance(cfg, args.checkpoint),
        quantized=not args.float,
        opset_version=args.opset,
        tell=lambda name: console.print(f'Exporting {name}'),
        target=target,
        runtime=args.runtime,
        int8_stages=args.int8_stages,
        only=args.only,
        fp16=args.fp16,
        check=check,
        weights=args.weights,
        layernorm=args.layernorm,
        dynamic_batch=args.dynamic_batch,
        custom_ops=args.allow_custom_ops,
    )
    console.print(f'Wrote {", ".join(manifest["files"])} and manifest.json to {args.out_dir}')
    if manifest['coverage']:
        for line in (manifest['coverage']['text'], *manifest['coverage']['lines']):
            console.print(line, markup=False)
    compile_exported(console, args.out_dir, manifest, args.compile)
    return results


if __name__ == '__main__':
    run_tool(main)
