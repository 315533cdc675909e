"""Runs the public BEVFusion project and ours on the real frame and prints how they differ.

Example:
    MMDET3D_BEVFUSION_PROJECT=~/mmdetection3d python tests/reference/compare.py --out out.json

The folder holds ``projects/BEVFusion``. Its CUDA extensions are stood in for: the voxelisation
is compiled from the project's own CPU sources (one line of them mended), the pooling is an
``index_add_``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import sys
import tempfile
import time
import types
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[2])]

from mmdet3d.registry import DATASETS, MODELS  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.dataset import pseudo_collate  # noqa: E402
from mmengine.logging import MMLogger  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402

from tests.frame import FLOAT_CONFIG, frame_dataset_cfg  # noqa: E402

PARTS = (
    'img_backbone', 'img_neck', 'view_transform', 'pts_middle_encoder', 'fusion_layer',
    'pts_backbone', 'pts_neck', 'bbox_head',
)  # fmt: skip


def import_public(folder: Path) -> None:
    """Imports the public project with stand-ins for what its setup.py compiles."""
    from torch.utils.cpp_extension import load

    ops = 'projects.BEVFusion.bevfusion.ops'
    source = folder / 'projects/BEVFusion/bevfusion/ops/voxel/src'
    with tempfile.TemporaryDirectory() as build:
        shutil.copytree(source, build, dirs_exist_ok=True)
        # Their lookup table has the axes z, y, x but is read at x, y, z: out of its bounds.
        kernel = Path(build, 'voxelization_cpu.cpp')
        wrong, right = ('{' + ', '.join(f'grid_size[{i}]' for i in o) + '}' for o in ('210', '012'))
        text = kernel.read_text()
        assert wrong in text, 'the voxelisation changed; see whether it still needs this'
        kernel.write_text(text.replace(wrong, right))
        names = ('voxelization.cpp', 'voxelization_cpu.cpp', 'scatter_points_cpu.cpp')
        files = [str(Path(build, name)) for name in names]
        sys.modules[f'{ops}.voxel.voxel_layer'] = load('voxel_layer', files, build_directory=build)

    def forward(x, geom, lengths, starts, batch, depth, height, width):  # noqa: ANN001
        b, d, h, w = (int(n) for n in (batch, depth, height, width))
        col_x, col_y, col_z, sample = geom.long().unbind(1)
        row = ((sample * d + col_z) * h + col_x) * w + col_y
        return x.new_zeros(b * d * h * w, x.shape[1]).index_add_(0, row, x).view(b, d, h, w, -1)

    def backward(grad, geom, lengths, starts, batch, depth, height, width):  # noqa: ANN001
        col_x, col_y, col_z, sample = geom.long().unbind(1)
        return grad[sample, col_z, col_x, col_y]

    pool = types.ModuleType(f'{ops}.bev_pool.bev_pool_ext')
    pool.bev_pool_forward, pool.bev_pool_backward = forward, backward
    sys.modules[pool.__name__] = pool
    sys.path.insert(0, str(folder))
    import projects.BEVFusion.bevfusion  # noqa: F401


def randomise(model: nn.Module, batch: dict) -> None:
    """Random affine batch norms, with the statistics of a batch: activations of a sane size."""
    torch.manual_seed(0)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        model.test_step(batch)
    model.eval()


def flatten(name: str, value: object) -> dict[str, Tensor]:
    """Tensors of a nested output by name, cloned: the public box coder writes into its input."""
    if isinstance(value, Tensor):
        return {name: value.detach().clone()}
    if isinstance(value, dict):
        items = value.items()
    else:
        items = enumerate(value) if len(value) > 1 else [(None, value[0])]
    out: dict[str, Tensor] = {}
    for key, item in items:
        out.update(flatten(name if key is None else f'{name}.{key}', item))
    return out


def run(
    dataset: dict, model_cfg: dict, weights: dict | None, bev: Tensor | None = None
) -> tuple[dict, dict]:
    """Builds dataset and model from what is registered now and runs the frame.

    Args:
        dataset: Settings of the data set.
        model_cfg: Settings of the model.
        weights: State dict; None for random weights.
        bev: What the head reads instead of the output of ``pts_neck``. Which of two nearly equal
            peaks comes first hangs on the last bit of its input, so heads are compared on one.

    Returns:
        Recorded tensors by name, and the model's state dict.
    """
    model = MODELS.build(copy.deepcopy(model_cfg)).eval()
    sample = DATASETS.build(copy.deepcopy(dataset))[0]
    if weights is None:
        randomise(model, pseudo_collate([copy.deepcopy(sample)]))
    else:
        model.load_state_dict(weights, strict=True)
    seen: dict[str, Tensor] = {}
    start = 0.0

    def before(module: nn.Module, args: tuple) -> None:
        nonlocal start
        start = time.perf_counter()

    for part in PARTS:

        def after(module: nn.Module, args: tuple, out: object, part: str = part) -> None:
            seconds = time.perf_counter() - start
            print(f'  {part:20s} {seconds:6.2f} s  {type(module).__module__}', flush=True)
            seen.update(flatten(part, out))

        module = getattr(model, part)
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
    model.view_transform.dtransform.register_forward_pre_hook(
        lambda m, args: seen.update(flatten('in.depth_map', args[0]))
    )
    model.pts_middle_encoder.register_forward_pre_hook(
        lambda m, args: seen.update(flatten('in.voxel', list(args[:2])))
    )
    own_bev: list[tuple] = []
    if bev is not None:

        def substitute(module: nn.Module, args: tuple) -> tuple:
            own_bev.append(args)
            return ([bev], *args[1:])

        hook = model.bbox_head.register_forward_pre_hook(substitute)
    geometry = model.view_transform.get_geometry

    def record(*args: Tensor, **kwargs: Tensor) -> Tensor:
        out = geometry(*args, **kwargs)
        seen['geometry'] = out.clone()
        return out

    model.view_transform.get_geometry = record
    seen['in.img'] = sample['inputs']['img']
    seen['in.points'] = sample['inputs']['points']
    for key in ('lidar2img', 'cam2img', 'cam2lidar', 'img_aug_matrix'):
        seen[f'in.{key}'] = torch.as_tensor(copy.deepcopy(sample['data_samples'].metainfo[key]))
    with torch.no_grad():
        result = model.test_step(pseudo_collate([sample]))[0].pred_instances_3d
    seen['result'] = labelled(result)
    if own_bev:
        hook.remove()
        with torch.no_grad():
            (alone,) = model.bbox_head.predict(*own_bev[0])
        seen['end_to_end'] = labelled(alone)
    return seen, model.state_dict()


def labelled(result: object) -> Tensor:
    """Boxes, scores and labels in one table, (n, box + 2)."""
    columns = (result.bboxes_3d.tensor, result.scores_3d[:, None], result.labels_3d[:, None])
    return torch.cat([c.double() for c in columns], dim=1)


def share_found(ours: Tensor, public: Tensor) -> float:
    """Share of the public boxes that we have too, whatever the order.

    Args:
        ours: From :func:`labelled`.
        public: The same.
    """
    near = (ours[None] - public[:, None]).abs() <= 1e-4 * public.abs().amax(0)
    return near.all(-1).any(1).double().mean().item()


def difference(ours: Tensor, public: Tensor) -> dict[str, float | bool]:
    """Relative L2 and largest absolute difference over largest absolute value."""
    if ours.shape != public.shape:
        return dict(l2=float('inf'), max=float('inf'), equal=False)
    a, b = ours.double(), public.double()
    return dict(
        l2=((a - b).norm() / b.norm().clamp(min=1e-30)).item(),
        max=((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item(),
        equal=bool(torch.equal(ours, public)),
    )


def main() -> None:
    """Compares and writes the figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', type=Path, required=True, help='where to write the figures')
    args = parser.parse_args()
    # With more, spconv's CPU convolutions are not even equal to themselves.
    torch.set_num_threads(1)
    import_public(Path(os.environ['MMDET3D_BEVFUSION_PROJECT']).expanduser())

    import mmdet3d_quant.bevfusion as ours

    assert MODELS.get('BEVFusion') is not ours.BEVFusion, 'ours must yield to the public project'
    init_default_scope('mmdet3d')
    MMLogger.get_instance('compare', log_level='ERROR')
    cfg = Config.fromfile(FLOAT_CONFIG)
    dataset = frame_dataset_cfg(cfg)
    model = cfg.model

    print('public')
    public_seen, weights = run(dataset, model, None)
    for registry, classes in ours.FAMILY:
        for cls in classes:
            registry.register_module(module=cls, force=True)
    print('ours')
    our_seen, _ = run(dataset, model, weights, public_seen['pts_neck'])

    names = [name for name in public_seen if name in our_seen]
    figures = {name: difference(our_seen[name], public_seen[name]) for name in names}
    missing = sorted(set(public_seen) - set(our_seen))
    # Which of two nearly equal peaks comes first, or last among the 200, hangs on the last bit.
    heads = [n for n in figures if n.startswith('bbox_head.') and 'dense' not in n]
    tables = [torch.cat([s[n][0].T for n in heads], dim=1) for s in (our_seen, public_seen)]
    found = dict(
        proposals=share_found(*tables),
        boxes=share_found(our_seen['result'], public_seen['result']),
        end_to_end=share_found(our_seen['end_to_end'], public_seen['result']),
    )
    figures = {n: f for n, f in figures.items() if n not in (*heads, 'result')}
    report = dict(figures=figures, missing=missing, found=found)
    args.out.write_text(json.dumps(report, indent=1))
    for what, share in found.items():
        print(f'{what}: {share:.1%} of the public ones are ours too')
    for name, f in sorted(figures.items()):
        shape = 'x'.join(map(str, public_seen[name].shape))
        print(f'{name:34s} {shape:>20s}  l2 {f["l2"]:.1e}  max {f["max"]:.1e}  {f["equal"]}')


if __name__ == '__main__':
    main()
