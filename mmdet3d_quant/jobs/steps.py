"""Steps of a calibration beside the ranges, as data: order, switches, and recipes of several.

To add a step, write its line in :data:`STEPS`: config, command line and ``meta`` follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Sequence, Union

from mmengine.config import Config
from torch import nn

from mmdet3d_quant.improve import BiasCorrection, EmptyCells, equalize_concats
from mmdet3d_quant.improve.channels import layers_of
from mmdet3d_quant.improve.cross_layer import equalize_layers
from mmdet3d_quant.improve.empty_cells import find_rows
from mmdet3d_quant.improve.norms import NormReestimation
from mmdet3d_quant.improve.rounding import LearnedRounding
from mmdet3d_quant.improve.smooth import smooth_linears
from mmdet3d_quant.improve.task_ranges import TaskRanges
from mmdet3d_quant.jobs.child_configs import PILLARS
from mmdet3d_quant.runs.from_config import ConfigError
from mmdet3d_quant.runs.listener import Listener

#: Name patterns by name of a step.
Chosen = Dict[str, List[str]]
#: The same as it is written: True means all.
Given = Mapping[str, Union[bool, str, Sequence[str]]]


@dataclass(frozen=True)
class Setup:
    """What steps may need of the job that runs them.

    Attributes:
        weights: How ranges of weights are chosen.
        batches: Loads this process's share of the batches that ranges are chosen from, numbered.
        listener: Told how far long steps are.
    """

    weights: str
    batches: Callable[[], Iterable[tuple[int, Any]]]
    listener: Listener = field(default_factory=Listener)


@dataclass(frozen=True)
class Before:
    """A step before the ranges: moves factors that float does not notice.

    Attributes:
        patterns: Names of what it changes.
        run: ``run(model, batches, patterns)``; its result has ``moves``.
        check: ``check(model, patterns)``: raises ValueError if a pattern names nothing.
    """

    patterns: List[str]
    run: Callable[[nn.Module, Iterable[Any], List[str]], Any]
    check: Callable[[nn.Module, List[str]], Any]


@dataclass(frozen=True)
class Step:
    """A kind of step.

    Attributes:
        name: Its key in ``calibration.steps`` of a config; with dashes its option.
        help: What it does, for the command line.
        make: ``make(patterns, setup)``: a :class:`Before` or a step after the ranges, see
            :class:`mmdet3d_quant.calibration.result.Correction`.
        meta: Key of the checkpoint's ``meta`` that tells what it changed.
        record: ``record(made, old)``: what that key holds, from the result of one before the
            ranges, or from the step after them, and from what it held.
        flag: It takes no patterns: on or off.
        serves: ``serves(model)``: whether a recipe has it for that model.
    """

    name: str
    help: str
    make: Callable[[List[str], Setup], Any]
    meta: str
    record: Callable[[Any, list], list]
    flag: bool = False
    serves: Callable[[nn.Module], bool] | None = None

    @property
    def option(self) -> str:
        """Its option on the command line."""
        return '--' + self.name.replace('_', '-')


def _moves(result: Any, old: list) -> list:
    return [*old, *(move.plain() for move in result.moves)]


def _names(attribute: str) -> Callable[[Any, list], list]:
    """Adds the names that an attribute of a step holds to those that were there."""
    return lambda step, old: sorted({*old, *getattr(step, attribute)})


def _has_pillars(model: nn.Module) -> bool:
    scatters = any(type(module).__name__ == PILLARS for module in model.modules())
    return scatters and any(True for _ in find_rows(model))


#: All steps in their order; the ranges are found between :data:`BEFORE` and the rest. Factors move
#: before, as ranges follow from them. Behind come ranges that follow from others, means of what
#: rounding left, weights, which are learned for the means as they are then, and biases.
STEPS = (
    Step(
        'equalize_concats',
        'scale inputs of a concat that differ much in size to one size, by powers of two that go '
        'into the batch norm before and out of the convolution behind: the float model stays as '
        'it is',
        lambda patterns, setup: Before(
            patterns, lambda model, batches, _: equalize_concats(model, batches), lambda *_: None
        ),
        'equalized',
        _moves,
        flag=True,
    ),
    Step(
        'equalize_layers',
        'scale the channels that these layers read alike, by powers of two that go into the layer '
        'before, through batch norm, ReLU, pooling and concats; the float model stays as it is',
        lambda patterns, setup: Before(patterns, equalize_layers, layers_of),
        'layers_equalized',
        _moves,
    ),
    Step(
        'smooth',
        'move outliers of what these linear layers read into their weights (SmoothQuant), by '
        'powers of two that go into the LayerNorm before; the float model stays as it is',
        lambda patterns, setup: Before(
            patterns, smooth_linears, lambda model, names: layers_of(model, names, nn.Linear)
        ),
        'smoothed',
        _moves,
    ),
    Step(
        'task_ranges',
        'move the ranges of what these layers read so that the maps by which the detector is '
        'judged are least wrong where there are objects',
        lambda patterns, setup: TaskRanges(patterns, listener=setup.listener),
        'ranges_moved',
        _names('moved'),
    ),
    Step(
        'empty_cells',
        'put the value that a channel has over cells without points on a step of INT8, by factors '
        'between batch norms and convolutions: for pillars; the float model stays as it is',
        lambda patterns, setup: EmptyCells(setup.weights),
        'empty_cells',
        lambda step, old: sorted(step.changed),
        flag=True,
        serves=_has_pillars,
    ),
    Step(
        'reestimate_norms',
        'move the running statistics of these batch norms by as much as quantization moves those '
        'of their inputs',
        lambda patterns, setup: NormReestimation(patterns, setup.batches),
        'norms_reestimated',
        _names('changed'),
    ),
    Step(
        'learned_rounding',
        'learn for each weight of these layers whether it is rounded up or down; in one process',
        lambda patterns, setup: LearnedRounding(patterns, listener=setup.listener),
        'rounding_learned',
        _names('flipped'),
    ),
    Step(
        'bias_correction',
        'take the mean error of the outputs of these layers off their biases',
        lambda patterns, setup: BiasCorrection(patterns),
        'bias_corrected',
        _names('corrected'),
    ),
)
BEFORE = ('equalize_concats', 'equalize_layers', 'smooth')
#: Steps of which a calibration has one: what is asked for, else the first that serves the model.
SAME_ERROR = ('reestimate_norms', 'bias_correction')
_EXACT = (*BEFORE, 'empty_cells')
_MORE: Dict[str, tuple] = {'fast': (), 'best': ('learned_rounding',)}
#: Steps by name of a recipe, each for all layers that it serves: ``fast`` has what is exact in
#: float or takes a pass over the batches, ``best`` also what takes minutes.
RECIPES = {
    name: tuple(s.name for s in STEPS if s.name in (*_EXACT, *more, *SAME_ERROR))
    for name, more in _MORE.items()
}
BY_NAME = {step.name: step for step in STEPS}


def as_chosen(given: Given, where: str) -> Chosen:
    """Normalises steps as they are written to patterns by name.

    Args:
        given: By name: True, a pattern or several.
        where: Where that is written, for errors.

    Raises:
        ConfigError: If a step is unknown, or its value is none of these.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f'{where} must be a dict of steps and patterns, got {given!r}')
    chosen: Chosen = {}
    for name, value in given.items():
        if name not in BY_NAME:
            raise ConfigError(f'{where}: unknown step {name!r}; there are {", ".join(BY_NAME)}')
        if value is False or value is None:
            continue
        patterns = ['*'] if value is True else [value] if isinstance(value, str) else value
        fits = isinstance(patterns, Sequence) and all(isinstance(p, str) for p in patterns)
        if not fits or (BY_NAME[name].flag and list(patterns) not in ([], ['*'])):
            wants = 'True' if BY_NAME[name].flag else "patterns, as ['*']"
            raise ConfigError(f'{where}: {name} takes {wants}, got {value!r}')
        if patterns:
            chosen[name] = list(patterns)
    return chosen


def read_steps(
    cfg: Config, model: nn.Module, recipe: str | None = None, *more: Given | None
) -> Chosen:
    """Reads the steps of a config, of a recipe, and those that a caller adds.

    Args:
        cfg: The config; its ``calibration`` may hold ``recipe`` and ``steps``.
        model: The model, which says what of a recipe serves it.
        recipe: Instead of the config's.
        *more: Steps that are added.

    Returns:
        Patterns by name, in the order of :data:`STEPS`.

    Raises:
        ConfigError: If a step or recipe is unknown, a value makes no sense, or two steps do not go
            together.
    """
    own = cfg.get('calibration') or {}
    name = recipe or own.get('recipe')
    if name is not None and name not in list(RECIPES):
        raise ConfigError(f'unknown recipe {name!r}; there are {", ".join(RECIPES)}')
    parts = [
        as_chosen(own.get('steps') or {}, f'{cfg.filename}: `calibration.steps`'),
        *(as_chosen(given or {}, 'steps') for given in more),
    ]
    if name is not None:
        parts.insert(0, _of_recipe(name, model, [k for part in parts for k in part]))
    joined: Chosen = {}
    for step in STEPS:
        patterns = [p for part in parts for p in part.get(step.name, ())]
        if patterns:
            joined[step.name] = list(dict.fromkeys(patterns))
    both = [name for name in SAME_ERROR if name in joined]
    if len(both) > 1:
        raise ConfigError(
            f'{" and ".join(both)} would take the same mean errors off twice: choose one'
        )
    return joined


def _of_recipe(name: str, model: nn.Module, given: Sequence[str]) -> Chosen:
    """The steps of a recipe that serve a model and go with those that are given."""
    names = [k for k in RECIPES[name] if _serves(BY_NAME[k], model)]
    first = next((k for k in (*given, *names) if k in SAME_ERROR), None)
    return {k: ['*'] for k in names if k not in SAME_ERROR or k == first}


def _serves(step: Step, model: nn.Module) -> bool:
    """Whether a step of a recipe has anything to do in a model."""
    if step.serves is not None:
        return step.serves(model)
    made = step.make(['*'], Setup('max', tuple))
    try:
        check(made, model)
    except ValueError:
        return False
    return True


def check(made: Any, model: nn.Module) -> None:
    """Checks what a step is to change, before the long run.

    Raises:
        ValueError: If one of its patterns names nothing.
    """
    if isinstance(made, Before):
        made.check(model, made.patterns)
    for method in ('layers', 'groups'):
        if hasattr(made, method):
            getattr(made, method)(model)
