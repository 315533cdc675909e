"""What an engine does with a graph that breaks a rule: words for it, and how grave it is.

The effects themselves are data in ``rules/effects.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

REFUSED, WRONG, FLOAT, SLOWER, NOTHING = 'refused', 'wrong numbers', 'float', 'slower', 'nothing'
#: Engines' makers contradict each other, or nobody tried.
UNKNOWN = 'not known'
ERROR, WARNING, NOTE = 'error', 'warning', 'note'

#: Where an effect was seen.
MEASURED = "NVIDIA's compiler 1.7.1"
PARSER8 = 'source of onnx-tensorrt 8.6'
PARSER10 = 'source of onnx-tensorrt 10.1'
MANUAL = "TensorRT's manual"
OPENVINO = 'OpenVINO 2026.4'
#: By the definition of the operators: the engine computes what the file says.
DEFINED = "ONNX's definition"
#: Nowhere: it is what another generation does.
UNSEEN = 'not seen'

_GRAVE = {
    REFUSED: ERROR,
    WRONG: ERROR,
    FLOAT: WARNING,
    SLOWER: WARNING,
    NOTHING: NOTE,
    UNKNOWN: WARNING,
}


@dataclass(frozen=True)
class Effect:
    """What one engine does.

    Attributes:
        what: :data:`REFUSED`, :data:`WRONG`, :data:`FLOAT`, :data:`SLOWER`, :data:`NOTHING` or
            :data:`UNKNOWN`.
        seen: Where, for example in an issue of a project, which is given by its number.
    """

    what: str
    seen: str

    @property
    def severity(self) -> str:
        """``error``, ``warning`` or ``note``; that nothing happens is only noted if it was seen."""
        if self.what == NOTHING and self.seen == UNSEEN:
            return WARNING
        return _GRAVE[self.what]
