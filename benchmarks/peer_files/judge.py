"""Judges of files of one part of a model: ONNX Runtime, OpenVINO and NVIDIA's compiler."""

from __future__ import annotations

from pathlib import Path

import onnx

from mmdet3d_quant.check.compare import Variant, compare
from mmdet3d_quant.engines import Arrays
from mmdet3d_quant.engines.tensorrt_rtx import compile_onnx
from peer_files.table import AUTOCAST, OURS, Row


class Judge:
    """Measures files of one part.

    Args:
        samples: Inputs by name, samples along a new first axis.
        sm: GPU generation for NVIDIA's compiler.
        threads: CPU threads.
        runs: Rounds in OpenVINO.
    """

    def __init__(self, samples: Arrays, sm: str, threads: int, runs: int) -> None:
        self.samples, self.sm, self.threads, self.runs = samples, sm, threads, runs

    def int8(self, files: dict[str, Path]) -> list[Row]:
        """Measures float32 files with and without Q/DQ.

        Args:
            files: By name; the first is float. One that is no ONNX is measured in OpenVINO only.
        """
        timed = compare(files, 'openvino', self.threads, self.samples, self.runs)
        rows = [
            Row(v.name, v.sqnr, faster=v.faster_than(timed[0]), openvino_int8=v.int8, unsigned=True)
            for v in timed
        ]
        graphs = {name: path for name, path in files.items() if path.suffix == '.onnx'}
        exact = {v.name: v.sqnr for v in self._exact(graphs)}
        for row in rows:
            if row.name in graphs:
                row.openvino_sqnr, row.sqnr = row.sqnr, exact[row.name]
                self._read(row, graphs[row.name])
        return rows

    def typed(self, files: dict[str, Path]) -> list[Row]:
        """Measures files typed FP16, which ONNX Runtime rounds to between operators.

        Args:
            files: By name: float, the float32 file that ours and AutoCast's were made from, others.

        Returns:
            list of rows, without float.
        """
        given = list(files)[1]
        rows = [Row(v.name, v.sqnr) for v in self._exact(files)[1:]]
        made = {n: p for n, p in files.items() if n in (given, AUTOCAST) or n.startswith(OURS)}
        near = {v.name: v.sqnr for v in self._exact(made)[1:]}
        for row in rows:
            row.against = near.get(row.name)
            self._read(row, files[row.name])
        return rows

    def _exact(self, files: dict[str, Path]) -> list[Variant]:
        """Closeness to the first file in ONNX Runtime, which computes what a file says."""
        return compare(files, 'onnxruntime', self.threads, self.samples, 1)

    def _read(self, row: Row, path: Path) -> None:
        """Adds what the compiler and the file itself say."""
        row.compiled = compile_onnx(path, [self.sm])[self.sm].summary()
        graph = onnx.load(str(path)).graph
        row.casts = sum(node.op_type == 'Cast' for node in graph.node)
        types = {i.name: i.data_type for i in graph.initializer}
        zeros = [list(n.input[2:3]) for n in graph.node if n.op_type == 'QuantizeLinear']
        row.unsigned = onnx.TensorProto.UINT8 in {types.get(name) for name in sum(zeros, [])}
