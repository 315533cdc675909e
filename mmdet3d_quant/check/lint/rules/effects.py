"""What engines do with a graph that breaks a rule: one line a rule, case and engine.

A line names what NVIDIA's compiler does and what was seen elsewhere; TensorRT 10 and 11, whose
parser and typing are the compiler's, are taken to do the same where nothing else was seen.
"""

from __future__ import annotations

from typing import Tuple

from mmdet3d_quant.check.lint.effects import (
    DEFINED,
    FLOAT,
    MANUAL,
    MEASURED,
    NOTHING,
    OPENVINO,
    PARSER8,
    PARSER10,
    REFUSED,
    SLOWER,
    UNKNOWN,
    UNSEEN,
    WRONG,
    Effect,
)

Told = Tuple[str, str]


def _case(
    rtx: str,
    tensorrt8: Told | None = None,
    tensorrt10: Told | None = None,
    tensorrt11: Told | None = None,
    openvino: Told | None = None,
) -> dict[str, Effect]:
    """Effects by what NVIDIA's compiler does, seen there, and what others do."""
    told = {
        'tensorrt8': tensorrt8 or (rtx, UNSEEN),
        'tensorrt10': tensorrt10 or (rtx, UNSEEN),
        'tensorrt11': tensorrt11 or (rtx, UNSEEN),
        'tensorrt-rtx': (rtx, MEASURED),
        'openvino': openvino,
    }
    return {name: Effect(*pair) for name, pair in told.items() if pair is not None}


def _parsed(effect: str, openvino: Told | None) -> dict[str, Effect]:
    """Effects that the source of two parsers shows, too."""
    return _case(effect, (effect, PARSER8), (effect, PARSER10), openvino=openvino)


def _everywhere(effect: str) -> dict[str, Effect]:
    """Effects where every engine computes what the file says."""
    engines = ('tensorrt8', 'tensorrt10', 'tensorrt11', 'tensorrt-rtx', 'openvino')
    return {name: Effect(effect, DEFINED) for name in engines}


def _only(name: str, *told: str) -> dict[str, Effect]:
    """The effect of an engine that is the only one to have the rule."""
    return {name: Effect(*told)}


_FLOAT, _SAME = (FLOAT, OPENVINO), (NOTHING, OPENVINO)
_AXES = 'NVIDIA/TensorRT#1694 and #2380 against onnx/tensorflow-onnx#2134'
_DYNAMIC = 'NVIDIA/TensorRT#3963'

#: By rule, then by case, ``''`` being the only one of a rule, then by the name of the target. A
#: rule does not exist for targets that are left out.
EFFECTS: dict[str, dict[str, dict[str, Effect]]] = {
    'Q01': {'': _case(NOTHING, (NOTHING, 'NVIDIA/TensorRT#1407'), openvino=_SAME)},
    'Q02': {'': _case(FLOAT, openvino=_FLOAT)},
    'Q03': {'': _case(FLOAT, openvino=_FLOAT)},
    'Q04': {'': _case(FLOAT, openvino=_FLOAT)},
    'Q05': {
        'input': _case(FLOAT, openvino=_FLOAT),
        'weight': _case(FLOAT, openvino=_FLOAT),
    },
    'Q06': {'': _case(NOTHING, (SLOWER, MANUAL), (SLOWER, MANUAL), openvino=_SAME)},
    'Q07': {
        'Q/DQ': _case(NOTHING, openvino=_SAME),
        'Q/DQ, one weight scale': _case(SLOWER, openvino=(NOTHING, UNSEEN)),
        'integers': _case(REFUSED, (REFUSED, 'microsoft/onnxruntime#14229'), openvino=_SAME),
    },
    'Q10': {'': _case(NOTHING, openvino=_SAME)},
    'Q11': {'': _case(SLOWER, (SLOWER, MANUAL), (SLOWER, MANUAL), openvino=(SLOWER, UNSEEN))},
    'Q12': {
        'a layer reads it': _case(FLOAT, openvino=_FLOAT),
        'no layer reads it': _case(NOTHING, openvino=_SAME),
    },
    'Q13': {
        'a layer reads it': _case(FLOAT, openvino=_FLOAT),
        'no layer reads it': _case(NOTHING, openvino=_SAME),
    },
    'Q14': {'': _case(SLOWER, openvino=(SLOWER, UNSEEN))},
    'Q15': {'': _case(NOTHING, openvino=_SAME)},
    'Q20': {
        'integers': _parsed(REFUSED, _SAME),
        'FP8': _case(WRONG, (REFUSED, PARSER8), openvino=(UNKNOWN, UNSEEN)),
    },
    'Q21': {
        'UINT8': _case(WRONG, (REFUSED, PARSER8), (WRONG, PARSER10)),
        'no zero point': _case(WRONG, (REFUSED, PARSER8), (WRONG, PARSER10)),
        'output_dtype': _parsed(REFUSED, None),
        'weight': _case(WRONG, (REFUSED, PARSER8), (WRONG, PARSER10), openvino=_FLOAT),
        'stored': _case(REFUSED, (REFUSED, PARSER8), openvino=_FLOAT),
    },
    'Q22': {
        'NaN': _parsed(REFUSED, (WRONG, DEFINED)),
        'infinite': _everywhere(WRONG),
    },
    'Q23': {'': _parsed(REFUSED, (WRONG, DEFINED))},
    'Q24': {'': _case(NOTHING, openvino=_SAME)},
    'Q25': {'': _everywhere(WRONG)},
    'Q26': {'': _everywhere(WRONG)},
    'Q27': {
        'constants': _case(NOTHING, (NOTHING, MANUAL), (NOTHING, MANUAL), openvino=_SAME),
        'data': _case(REFUSED, (REFUSED, MANUAL), (REFUSED, MANUAL), openvino=_FLOAT),
    },
    'Q28': {
        'Conv': _case(FLOAT, openvino=_FLOAT),
        'product': _case(FLOAT, openvino=(FLOAT, UNSEEN)),
        'ConvTranspose': _case(
            NOTHING, (UNKNOWN, _AXES), (UNKNOWN, _AXES), (UNKNOWN, _AXES), openvino=_FLOAT
        ),
    },
    'Q29': {
        'number': _parsed(REFUSED, (REFUSED, OPENVINO)),
        'dimensions': _case(REFUSED, tensorrt10=(REFUSED, PARSER10), openvino=(REFUSED, OPENVINO)),
    },
    'Q30': {'': _case(FLOAT, openvino=_SAME)},
    'Q31': {'': _everywhere(WRONG)},
    'Q32': {
        'read as numbers': _case(REFUSED, openvino=(REFUSED, OPENVINO)),
        'read by nobody': _case(NOTHING, openvino=_SAME),
        'an output': _case(NOTHING, openvino=(NOTHING, UNSEEN)),
    },
    'Q33': {'': _everywhere(WRONG)},
    'Q34': {'': _case(NOTHING, openvino=_SAME)},
    'Q35': {'': _only('tensorrt8', REFUSED, PARSER8)},
    'Q36': {'': _only('tensorrt-rtx', FLOAT, MEASURED)},
    'Q37': {'': _parsed(REFUSED, (REFUSED, OPENVINO))},
    'Q38': {
        'activation of a convolution': _case(
            FLOAT, (NOTHING, PARSER8), (NOTHING, PARSER10), openvino=_SAME
        ),
        'FP16 weight of a convolution': _case(REFUSED, openvino=(NOTHING, UNSEEN)),
        'elsewhere': _case(NOTHING, (NOTHING, PARSER8), (NOTHING, PARSER10), openvino=_SAME),
    },
    'Q39': {
        'other than its tensor': _case(REFUSED, openvino=(REFUSED, OPENVINO)),
        'FP16': _only('tensorrt8', REFUSED, 'NVIDIA/Model-Optimizer#454'),
    },
    'Q40': {'': _only('tensorrt8', UNKNOWN, PARSER8)},
    'Q41': {
        'INT16': _case(REFUSED, (REFUSED, PARSER8), (REFUSED, PARSER10), openvino=_FLOAT),
        'INT4': _case(REFUSED, (REFUSED, PARSER8), openvino=_SAME),
        'INT4 weight only': _case(FLOAT, (REFUSED, PARSER8), openvino=(FLOAT, UNSEEN)),
        'FP8': {'tensorrt8': Effect(REFUSED, PARSER8), 'openvino': Effect(*_FLOAT)},
        'other FP8': _case(REFUSED, (REFUSED, PARSER8), openvino=(FLOAT, UNSEEN)),
    },
    'Q43': {
        'layer': _case(REFUSED, openvino=(FLOAT, UNSEEN)),
        'concat': _case(REFUSED, openvino=(FLOAT, UNSEEN)),
    },
    'Q45': {
        '': {
            'tensorrt10': Effect(FLOAT, UNSEEN),
            'tensorrt11': Effect(FLOAT, UNSEEN),
            'tensorrt-rtx': Effect(FLOAT, MEASURED),
        }
    },
    'Q44': {'': _case(NOTHING, openvino=(UNKNOWN, UNSEEN))},
    'Q42': {
        'in the operator': _case(
            REFUSED, (REFUSED, 'onnx/onnx-tensorrt#560'), (REFUSED, PARSER10), openvino=_SAME
        ),
        'while it runs': _case(REFUSED, (REFUSED, _DYNAMIC), (REFUSED, PARSER10), openvino=_FLOAT),
    },
}
