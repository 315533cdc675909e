"""Where modules went: paths of 0.1 that keep working for one release, with a warning.

To take a path out, delete its line; when the table is empty, this file and its call.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

#: Old path to new one, below ``mmdet3d_quant``.
MOVED = {
    'calibration.ranges': 'calibration.choose',
    'qat.ranges': 'qat.moving',
    'report.ranges': 'report.calibration',
    'bevfusion.targets': 'bevfusion.training_targets',
    'compat': 'core.compat',
    'naming': 'core.naming',
    'errors': 'core.errors',
    'spec': 'core.spec',
    'fake_quant': 'core.fake_quant',
    'quantizer': 'core.quantizer',
    'modes': 'core.modes',
    'ties': 'core.ties',
    'amax': 'calibration.amax',
    'histogram': 'calibration.histogram',
    'counting': 'calibration.counting',
    'checkpoint': 'files.checkpoint',
    'fold': 'layers.fold',
    'layers.once': 'core.joined',
    'conversion': 'runs.conversion',
    'from_config': 'runs.from_config',
    'provenance': 'runs.provenance',
    'evaluation': 'data.evaluation',
    'samples': 'data.samples',
    'synthetic.check': 'data.nuscenes',
    'optim': 'qat.optim',
    'export.engine_files': 'engines.files',
    'export.memory': 'engines.memory',
    'export.trt': 'engines.tensorrt',
    'export.openvino_graph': 'engines.openvino.graph',
    'export.openvino_fusion': 'engines.openvino.fusion',
    'export.openvino_nodes': 'engines.openvino.nodes',
    'export.engines': 'engines',
    'export.lint.graph': 'check.lint.graph',
    'export.lint.layers': 'check.lint.layers',
    'export.lint.picture': 'check.lint.picture',
    'export.lint.reformat': 'check.lint.reformat',
    'export.lint.rules': 'check.lint.rules',
    'export.lint': 'check.lint',
    'export.verify': 'check.verify',
    'export.ladder': 'check.ladder',
    'export.compare': 'check.compare',
    'export.points': 'check.probes',
    'export.detector': 'check.detector',
    'export.scn.verify': 'check.sparse',
    'export.scn.check': 'export.sparse.check',
    'export.scn.precision': 'export.sparse.precision',
    'export.scn.program': 'export.sparse.program',
    'export.scn.read': 'export.sparse.read',
    'export.scn.run': 'export.sparse.run',
    'export.scn.trace': 'export.sparse.trace',
    'export.scn.write': 'export.sparse.write',
    'export.scn': 'export.sparse',
}
_HERE = f'{__package__}.'


def _new(fullname: str) -> str | None:
    """The new path of a module or of what lies in a moved package; None if it did not move."""
    if not fullname.startswith(_HERE):
        return None
    old, rest = fullname[len(_HERE) :], ''
    while old and old not in MOVED:
        old, _, last = old.rpartition('.')
        rest = f'.{last}{rest}'
    return f'{_HERE}{MOVED[old]}{rest}' if old else None


class _Package(ModuleType):
    """A package whose functions stay when a moved module of the same name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and callable(vars(self).get(name))):
            super().__setattr__(name, value)


class _Finder(MetaPathFinder, Loader):
    """Gives the new module under its old name."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if _new(fullname) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = _new(spec.name)
        assert new is not None  # find_spec asked before
        warnings.warn(
            f'{spec.name} is {new} now; the old path goes with the next release',
            FutureWarning,
            stacklevel=2,
        )
        module = import_module(new)
        parent = sys.modules[spec.name.rpartition('.')[0]]
        if type(parent) is ModuleType:
            parent.__class__ = _Package
        self.kept = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.kept  # the import system has put the old name there


def keep_old_paths() -> None:
    """Lets old paths be imported; called once, by the package."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # before a moved package finds a copy of its own
