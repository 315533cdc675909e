"""Files: outputs that appear whole, checkpoints that run no code when read."""

from mmdet3d_quant.files.checkpoint import CheckpointError, read_checkpoint
from mmdet3d_quant.files.outputs import check_writable, sha256, whole, whole_folder

__all__ = [
    'CheckpointError',
    'check_writable',
    'read_checkpoint',
    'sha256',
    'whole',
    'whole_folder',
]
