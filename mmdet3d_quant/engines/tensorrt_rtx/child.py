"""Compiles one ONNX file for one GPU generation, in a process that may die: ``child.py JOB``.

A script that imports nothing of this package, so that it starts in tenths of a second. The job is
a JSON file with ``model`` (file to parse), ``path`` (the original, for weights in other files),
``sm``, ``plan`` (where to keep the engine, or None) and ``answer`` (where to write the answer).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Compiles the file of a job.

    Returns:
        Dict of ``accepted``, ``errors`` and ``warnings`` (texts), ``log`` (what the compiler tells
        of its layers), ``engine_bytes``, ``seconds`` and ``version``.
    """
    import tensorrt_rtx_bindings as trt

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[Any, str]] = []

        def log(self, severity: Any, message: str) -> None:
            self.lines.append((severity, message))

        def of(self, *severities: Any) -> list[str]:
            return [message for severity, message in self.lines if severity in severities]

    log, start, plan = Log(), time.perf_counter(), None
    builder = trt.Builder(log)
    network = builder.create_network(0)  # types are those of the file
    parser = trt.OnnxParser(network, log)
    if parser.parse(Path(job['model']).read_bytes(), job['path']):
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # tells types and origins
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, job['sm']), 0)
        profile = smallest(builder, network)
        if profile is not None:
            config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        errors = log.of(trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)
    else:
        found = [parser.get_error(i) for i in range(parser.num_errors)]
        errors = [e.desc() + (f' (node {e.node_name()})' if e.node_name() else '') for e in found]
    if plan is not None and job['plan']:
        Path(job['plan']).write_bytes(plan)
    return dict(
        accepted=plan is not None,
        errors=errors,
        warnings=log.of(trt.ILogger.WARNING),
        log='\n'.join(m for _, m in log.lines if m.startswith('Layers:')),
        engine_bytes=plan.nbytes if plan is not None else 0,
        seconds=time.perf_counter() - start,
        version=trt.__version__,
    )


def smallest(builder: Any, network: Any) -> Any:
    """Makes a profile in which every open size of an input is 1; None if no size is open."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    if all(size >= 0 for tensor in inputs for size in tensor.shape):
        return None
    profile = builder.create_optimization_profile()
    for tensor in inputs:
        shape = [size if size >= 0 else 1 for size in tensor.shape]
        profile.set_shape(tensor.name, shape, shape, shape)
    return profile


if __name__ == '__main__':
    sys.path.pop(0)  # this folder, whose names are not those of installed packages
    JOB = json.loads(Path(sys.argv[1]).read_text())
    Path(JOB['answer']).write_text(json.dumps(answer(JOB)))
