"""Tasks of a sensitivity analysis, here or in several processes, each with a model of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Mapping

import torch

from mmdet3d_quant.jobs.ledger import Ledger
from mmdet3d_quant.runs import from_config as fc
from mmdet3d_quant.runs.listener import Listener
from mmdet3d_quant.sensitivity.measure import Bench

Task = Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """All that a process needs to make a bench.

    Attributes:
        config: Path of a config with quantized types.
        checkpoint: Its calibrated checkpoint.
        truth: Whose boxes are the truth, see :data:`mmdet3d_quant.sensitivity.measure.TRUTHS`.
        device: Where to run.
        overrides: Entries of the config, by dotted key.
    """

    config: str
    checkpoint: str
    truth: str = 'float'
    device: str | None = None
    overrides: dict[str, Any] | None = None

    def make(self) -> tuple[Bench, list[int]]:
        """Builds the model and its data.

        Returns:
            The bench, and the numbers of the frames in the order of the loader.

        Raises:
            ConfigError: If the config or its data are wrong.
            CheckpointError: If the checkpoint does not fit.
            UncalibratedError: If it has no ranges.
        """
        cfg = fc.read_config(self.config, self.overrides)
        model = fc.build_model(cfg)
        fc.load_weights(model, self.checkpoint, calibrated=True)
        _, loader = fc.build_calibration_loader(cfg)

        def load(frame: int) -> Any:
            return next(fc.numbered_batches(loader, {0: [frame]}))[1]

        numbers = [index for batch in fc.batch_indices(loader) for index in batch]
        bench = Bench(model.to(fc.pick_device(self.device)), load, self.truth)
        return bench, list(dict.fromkeys(numbers))


def perform(bench: Bench, task: Task) -> Any:
    """Does a task: ``kind`` is a method of the bench, the rest its arguments.

    A mix is named by ``only``, the members that are quantized, or ``floats``, those that are not.
    """
    given = {name: value for name, value in task.items() if name != 'kind'}
    if 'floats' in given:
        floats = set(given.pop('floats'))
        given['quantized'] = [name for name in bench.members if name not in floats]
    if 'only' in given:
        given['quantized'] = given.pop('only')
    return getattr(bench, task['kind'])(**given)


class Tasks:
    """Runs tasks that the ledger has no result of, and writes their results there.

    Args:
        bench: Of this process.
        recipe: For other processes.
        ledger: Where results go.
        listener: Receives the progress.
        processes: How many work; with one it is this one.
    """

    def __init__(
        self, bench: Bench, recipe: Recipe, ledger: Ledger, listener: Listener, processes: int = 1
    ) -> None:
        self.bench, self.ledger, self.listener = bench, ledger, listener
        self._pool = None
        if processes > 1:
            self._pool = ProcessPoolExecutor(
                processes,
                mp_context=multiprocessing.get_context('spawn'),
                initializer=_start,
                initargs=(recipe, torch.get_num_threads()),
            )

    def run(self, title: str, tasks: Sequence[Task]) -> list[Any]:
        """Runs tasks; returns their results in order."""
        todo = [task for task in tasks if task not in self.ledger]
        with self.listener.counting(title, len(tasks), len(tasks) - len(todo)) as count:
            done = len(tasks) - len(todo)
            if self._pool is None or len(todo) < 2:
                for task in todo:
                    self.ledger.add(task, perform(self.bench, task))
                    count(done := done + 1)
            else:
                waiting = {self._pool.submit(_work, dict(task)): task for task in todo}
                for future in as_completed(waiting):
                    self.ledger.add(waiting[future], future.result())
                    count(done := done + 1)
        return [self.ledger[task] for task in tasks]

    def close(self) -> None:
        """Ends the other processes."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)


_bench: Bench | None = None


def _start(recipe: Recipe, threads: int) -> None:
    global _bench
    torch.set_num_threads(threads)
    _bench, _ = recipe.make()


def _work(task: Task) -> Any:
    assert _bench is not None
    return perform(_bench, task)
