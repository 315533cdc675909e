"""Where in a checkpoint the weights are: under which key, or in a model that was pickled whole."""

from __future__ import annotations

from typing import Any

from mmengine.logging import print_log
from torch import Tensor

from mmdet3d_quant.files.errors import CheckpointError
from mmdet3d_quant.files.plain import nonfinite_entries
from mmdet3d_quant.files.unpickler import Inert, pickled_weights

#: Keys under which trainers store weights; the first that a file has is taken.
KEYS = (
    'state_dict', 'model', 'model_state', 'model_state_dict', 'module', 'net', 'network',
    'weights', 'params', 'ema_state_dict', 'state_dict_ema', 'model_ema', 'ema_model', 'ema',
)  # yapf: disable  # fmt: skip
_SAVE = "save {'state_dict': model.state_dict()} instead"


def with_state_dict(data: Any, path: Any) -> dict[str, Any]:
    """Puts the weights of a file where mmengine looks for them.

    Tells which key was taken, where it is not ``state_dict`` or not the only one.

    Args:
        data: What the file holds.
        path: How errors name it.

    Returns:
        ``data`` with the weights, names to tensors, under ``state_dict``. Of a model that was
        pickled whole, only those.

    Raises:
        CheckpointError: If there are none, or they hold anything but tensors, NaN or infinity.
    """
    if isinstance(data, Inert):
        return dict(state_dict=_of_model(data, path))
    if not isinstance(data, dict):
        raise CheckpointError(f'checkpoint {path} holds a {type(data).__name__}: {_SAVE}')
    found = [key for key in KEYS if key in data and _may_be_weights(data[key], key)]
    if found:
        state = data[found[0]]
        if isinstance(state, Inert):
            state = _of_model(state, path)
        if found != ['state_dict']:
            _tell(found, path)
    else:
        state = data
        if not any(isinstance(value, Tensor) for value in data.values()):
            keys = ', '.join(map(str, list(data)[:8])) or 'nothing'
            raise CheckpointError(f'checkpoint {path} has no state_dict, it holds {keys}: {_SAVE}')
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd or not state:
        what = f'{odd[0]!r} in the state_dict is no tensor' if odd else 'its state_dict is empty'
        raise CheckpointError(
            f"checkpoint {path}: {what}: save {{'state_dict': model.state_dict()}} again"
        )
    bad = nonfinite_entries(state)
    if bad:
        raise CheckpointError(
            f'checkpoint {path}: {bad[0]} holds NaN or infinity ({len(bad)} such entries): '
            'take one from before the training diverged'
        )
    return dict(data, state_dict=state) if found else dict(state_dict=state)


def _may_be_weights(value: Any, key: str) -> bool:
    if not isinstance(value, dict):
        return pickled_weights(value) is not None
    return key == 'state_dict' or any(isinstance(v, Tensor) for v in value.values())


def _of_model(model: Inert, path: Any) -> dict[str, Tensor]:
    state = pickled_weights(model)
    if state is None:
        raise CheckpointError(
            f'checkpoint {path} has no state_dict but an object of {model.named or "a class"}, '
            f'which is not read, since that may run code: {_SAVE}'
        )
    print_log(
        f'{path}: a model that was pickled whole ({model.named}); its weights were read, its code '
        'was not run',
        logger='current',
    )
    return state


def _tell(found: list[str], path: Any) -> None:
    others = f'; {", ".join(found[1:])} of the same file not' if found[1:] else ''
    why = ', as mmengine does, whose EMAHook stores the averaged weights there'
    if found[0] != 'state_dict' or 'ema_state_dict' not in found:
        why = ''
    print_log(f'{path}: weights are taken from {found[0]}{why}{others}', logger='current')
