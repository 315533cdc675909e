"""The rules of TensorRT's explicit quantization: data, with one small function each.

They follow NVIDIA's TensorRT documentation ("Working with Quantized Types": explicit quantization,
Q/DQ placement, Q/DQ limitations) and what its layers can fuse.

A new rule is one decorated function in the file of its group, and its planted defect in
``tests/check/test_lint.py``.
"""

from mmdet3d_quant.check.lint.rules import (  # noqa: F401  each registers its rules
    channels,
    convolutions,
    formats,
    joins,
    pairs,
    scales,
)
from mmdet3d_quant.check.lint.rules.registry import (
    RULES,
    Finding,
    Found,
    Rule,
    is_quantized,
    lint,
    rule,
)

__all__ = ['RULES', 'Finding', 'Found', 'Rule', 'is_quantized', 'lint', 'rule']

# Reports go by id, whichever file a rule is in.
RULES.sort(key=lambda rule: rule.id)
