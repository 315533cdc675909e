"""The files, run as they are, against the model that they were made of."""

import numpy as np
import onnx
import pytest
import torch

from mmdet3d_quant.check.runs import sqnr
from mmdet3d_quant.engines import ONNXRuntime
from mmdet3d_quant.export.autoware.modules import Body
from mmdet3d_quant.export.sparse import trace
from mmdet3d_quant.export.sparse.arithmetic import AUTOWARE, with_int8
from mmdet3d_quant.export.sparse.program import Add, Relu, SparseConv
from mmdet3d_quant.export.sparse.run import ScnNetwork
from tests.export.autoware.detectors import detector, files
from tests.export.detectors import small_detector


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    cfg, batch = small_detector(tmp_path_factory.mktemp('small'))
    return detector(cfg.model.to_dict(), batch, camera=False), batch


def voxels_of(model, points):
    voxels, coors, counts = model.pts_voxel_layer(points.float())
    arrays = dict(voxels=voxels, coors=coors.int(), num_points_per_voxel=counts.int())
    return {name: value.numpy() for name, value in arrays.items()}


class LayerByLayer(ScnNetwork):
    """The model in Autoware's arithmetic, each layer on what the file gave to its layer.

    Both round to FP16 behind sums of another order, so that last bits differ. Rounding to INT8
    turns one of them into a step, which grows from layer to layer: maps say little of a layer.
    """

    def __init__(self, program, found, places):
        super().__init__(program, fp16_tensors=True)
        self.found, self.places = found, {program.input: places}
        self.made = {program.input: 'lidar/voxels'}
        self.differing = {}

    def _run(self, op, inputs):
        if not isinstance(op, (SparseConv, Add, Relu)):
            return super()._run(op, inputs)
        fed = [self.of_file(name, x) for name, x in zip(op.inputs, inputs)]
        source = op.inputs[0]
        moves = isinstance(op, SparseConv) and not op.subm
        out_inds = f'lidar/{getattr(op, "rulebook", "")}/out_inds'
        self.places[op.output] = self.found[out_inds] if moves else self.places[source]
        name = f'{self.made[source]}.relu' if isinstance(op, Relu) else f'lidar/{op.layer}'
        self.made[op.output] = name
        y = super()._run(op, fed)
        ours, theirs = y.features, self.of_file(op.output, y).features
        bit = torch.from_numpy(np.spacing(np.abs(ours.numpy()).astype(np.float16))).float()
        assert ((ours - theirs).abs() <= bit + 1e-6 * ours.abs().max()).all(), name
        self.differing[name] = (ours != theirs).float().mean()
        return y

    def of_file(self, name, like):
        """A tensor of the file, its voxels in the order of another."""
        radix = torch.tensor([10**9, 10**6, 10**3, 1])
        ours = like.indices.long() @ radix
        theirs = torch.from_numpy(self.places[name]).long() @ radix
        order = theirs.argsort()[torch.searchsorted(theirs.sort()[0], ours)]
        assert torch.equal(theirs[order], ours) and len(ours) == len(theirs)
        values = torch.from_numpy(self.found[self.made[name]]).float()
        return like.replace_feature(values[order])


def watched(graph, path):
    """The file with all tensors of the sparse encoder as outputs."""
    names = [o for n in graph.graph.node for o in n.output if o.startswith('lidar')]
    graph.graph.output.extend(map(onnx.helper.make_empty_tensor_value_info, names))
    onnx.save(graph, str(path))
    return path


@torch.no_grad()
def run(model, batch, folder, stages):
    """Tensors of the file; the map of the model, and the share of last bits by layer."""
    made, _ = files(model, batch, folder, int8_stages=stages)
    points = batch['inputs']['points'][0]
    file = watched(made['bevfusion_lidar'], folder / 'watched.onnx')
    found = ONNXRuntime(file)(voxels_of(model, points))
    program = trace(model.pts_middle_encoder, arithmetic=with_int8(AUTOWARE, stages))
    features, coors, _ = model.voxelize([points])
    network = LayerByLayer(program, found, found['lidar/indices'])
    wanted = network(features, coors).numpy()
    assert len(network.differing) == sum(
        isinstance(o, (SparseConv, Add, Relu)) for o in program.ops
    )
    return found, wanted, network.differing


@pytest.mark.parametrize('stages', [(), AUTOWARE.int8, ('*',)], ids=['none', 'default', 'all'])
def test_a_file_computes_what_the_model_does_in_autowares_arithmetic(small, tmp_path, stages):
    found, wanted, differing = run(*small, tmp_path, stages)
    assert np.isfinite(found['lidar']).all() and np.abs(wanted).max() > 0
    assert sqnr(wanted, found['lidar']) > 90
    assert max(differing.values()) < 1e-2
    with torch.no_grad():  # on the same map the dense part gives the same boxes
        rows, score, labels = (t.numpy() for t in Body(small[0])(torch.from_numpy(found['lidar'])))
    assert np.array_equal(np.sort(labels), np.sort(found['label_pred']))
    np.testing.assert_allclose(np.sort(score), np.sort(found['score']), atol=2e-3)
