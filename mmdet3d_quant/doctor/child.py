"""Imports modules one after the other and says what came of it; runs in a process of its own.

An import may crash the process (a module that was compiled for another torch), so the parent hears
of each module before and after. It knows nothing of the package.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
from typing import Any, Callable, Dict


def torch_facts(torch: Any) -> dict[str, Any]:
    """Reads what torch sees of the machine."""
    count = torch.cuda.device_count()
    kinds = [torch.cuda.get_device_properties(i) for i in range(count)]
    dynamo = inspect.signature(torch.onnx.export).parameters.get('dynamo')
    return dict(
        threads=torch.get_num_threads(),
        cuda=torch.version.cuda,
        gpus=[dict(name=k.name, sm=[k.major, k.minor], bytes=k.total_memory) for k in kinds],
        archs=torch.cuda.get_arch_list() if count else [],
        dynamo=bool(dynamo is not None and dynamo.default),
    )


#: What more is asked of a module.
MORE: Dict[str, Callable[[Any], Any]] = {
    'torch': torch_facts,
    'mmcv.ops': lambda m: dict(cuda=m.get_compiling_cuda_version()),
    'onnxruntime': lambda m: dict(providers=m.get_available_providers()),
}


def main(home: str, names: list[str]) -> None:
    """Imports modules by name.

    Args:
        home: Folder to import from, too.
        names: The modules.
    """
    out = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what libraries print is no answer
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if path != here]
    if home not in sys.path:
        sys.path.insert(0, home)

    def say(**answer: Any) -> None:
        print(json.dumps(answer), file=out, flush=True)

    for name in names:
        say(begins=name)
        try:
            module = importlib.import_module(name)
            top = sys.modules[name.partition('.')[0]]
            more = MORE[name](module) if name in MORE else {}
            version = str(getattr(top, '__version__', ''))
            say(name=name, error='', version=version, file=str(top.__file__), **more)
        except BaseException as err:  # also an exit that an import asks for
            say(name=name, error=f'{type(err).__name__}: {err}')


if __name__ == '__main__':
    main(sys.argv[1], sys.argv[2:])
