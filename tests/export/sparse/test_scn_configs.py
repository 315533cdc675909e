"""The encoders of the configs in their sizes: random points, and a real frame."""

import copy

import numpy as np
import pytest
import torch
from mmengine.config import Config

from mmdet3d_quant import calibrate, fold_bn
from mmdet3d_quant.check.verify import sqnr
from mmdet3d_quant.data.samples import real_frame
from mmdet3d_quant.export.sparse import export_lidar, read_program
from mmdet3d_quant.export.sparse.run import ScnNetwork
from mmdet3d_quant.files.checkpoint import read_checkpoint
from mmdet3d_quant.layers.sparse import SPARSE_CONVS
from mmdet3d_quant.models import QuantBEVFusionSparseEncoder
from mmdet3d_quant.parents import BEVFusionSparseEncoder
from tests.export.sparse.encoders import enliven, turned
from tests.frame import FLOAT_CONFIG, ROOT, on_real_frame

TINY = ROOT / 'configs/bevfusion_tiny/bevfusion_tiny_lidar-cam_synthetic.py'
TINY_WEIGHTS = ROOT / 'checkpoints/bevfusion_tiny_lidar-cam_synthetic.pth'


def encoder(config, kind=BEVFusionSparseEncoder):
    cfg = Config.fromfile(config)
    torch.manual_seed(0)
    settings = {n: v for n, v in cfg.model.pts_middle_encoder.items() if n != 'type'}
    return enliven(kind(**settings)), cfg


def random_points(count):
    """Most near, most near the ground; columns x, y, z, intensity, seconds."""
    rng = np.random.default_rng(0)
    far = rng.gamma(2, 8, count)
    angle = rng.uniform(0, 2 * np.pi, count)
    z = -1.8 + rng.exponential(0.5, count)
    points = [far * np.cos(angle), far * np.sin(angle), z, 255 * rng.beta(0.5, 3, count)]
    return np.stack([*points, rng.choice(10, count) * 0.05], 1).astype('f4')


def voxels(cfg, points):
    """Means of the points of each cell (N, 5), and the cells (N, 4)."""
    low, high = np.split(np.array(cfg.point_cloud_range, 'f4'), 2)
    points = points[((points[:, :3] >= low) & (points[:, :3] < high)).all(1)]
    cells = ((points[:, :3] - low) / np.array(cfg.voxel_size, 'f4')).astype(int)
    cells, which, counts = np.unique(cells, axis=0, return_inverse=True, return_counts=True)
    sums = np.zeros((len(cells), 5))
    np.add.at(sums, which.ravel(), points)
    coors = np.pad(cells, ((0, 0), (1, 0)))
    return torch.from_numpy((sums / counts[:, None]).astype('f4')), torch.from_numpy(coors)


def check(model, feats, coors, folder, least=40):
    """Both orders against the encoder in float32; the file in FP16 throughout, as it is run."""
    with torch.no_grad():
        wanted = model(feats, coors, 1)
    for order, at in (('xyz', coors), ('zyx', turned(coors))):
        path = folder / f'lidar.{order}.onnx'
        export_lidar(model, path, order)
        found = ScnNetwork(read_program(path), fp16_tensors=True)(feats, at)
        assert found.shape == wanted.shape and sqnr(wanted, found) > least, order
    return wanted


def check_int8(model, feats, coors, folder):
    """Equal to fake quantization, bit for bit, with the weights that the file has."""
    calibrate(model, [(feats, coors, 1)])
    export_lidar(model, folder / 'int8.onnx')
    out = ScnNetwork(read_program(folder / 'int8.onnx'))(feats, coors)
    model = fold_bn(copy.deepcopy(model))
    for conv in model.modules():
        if isinstance(conv, SPARSE_CONVS):
            conv.weight.data = conv.weight.data.half().float()
            conv.bias.data = conv.bias.data.half().float()
    with torch.no_grad():
        assert torch.equal(out, model(feats, coors, 1))


def trained(model):
    state = read_checkpoint(TINY_WEIGHTS)['state_dict']
    prefix = 'pts_middle_encoder.'
    own = {n[len(prefix) :]: v.float() for n, v in state.items() if n.startswith(prefix)}
    missing, odd = model.load_state_dict(own, strict=False)
    assert not odd and all('quantizer' in n for n in missing)
    return model.eval()


def test_tiny_config_with_its_trained_weights(tmp_path):
    model, cfg = encoder(TINY)
    feats, coors = voxels(cfg, random_points(20_000))
    check(trained(model), feats, coors, tmp_path)
    quant, _ = encoder(TINY, QuantBEVFusionSparseEncoder)
    check_int8(trained(quant), feats, coors, tmp_path)


@pytest.mark.slow
def test_full_size(tmp_path):
    model, cfg = encoder(FLOAT_CONFIG)
    assert model.sparse_shape == [1440, 1440, 41]
    feats, coors = voxels(cfg, random_points(60_000))
    assert check(model, feats, coors, tmp_path).shape == (1, 256, 180, 180)
    check_int8(encoder(FLOAT_CONFIG, QuantBEVFusionSparseEncoder)[0], feats, coors, tmp_path)


@pytest.mark.slow
@on_real_frame
def test_full_size_on_a_real_frame(tmp_path):
    model, cfg = encoder(FLOAT_CONFIG)
    file = next(real_frame().glob('*LIDAR_TOP*.bin'))
    points = np.fromfile(file, 'f4').reshape(-1, 5)
    points[:, 4] = 0  # seconds; in the file it is the ring
    feats, coors = voxels(cfg, points)
    assert len(feats) > 10_000
    check(model, feats, coors, tmp_path)
    check_int8(encoder(FLOAT_CONFIG, QuantBEVFusionSparseEncoder)[0], feats, coors, tmp_path)
