"""Autoware's plugin nodes on a CPU, against spconv itself."""

import numpy as np
import pytest
import torch
from spconv.pytorch import SparseConv3d, SparseConvTensor, SubMConv3d

from mmdet3d_quant.engines import ONNXRuntime
from tests.engines.plugin_files import CONVOLUTIONS, SHAPE, autoware_file, cloud, weights_of


def _sorted(indices, features):
    order = np.lexsort(indices.T[::-1])
    return indices[order], features[order]


@pytest.mark.parametrize('voxels', [1, 150])
@pytest.mark.parametrize('kernel, stride, padding, dilation, subm', CONVOLUTIONS)
def test_a_convolution_is_spconvs(kernel, stride, padding, dilation, subm, voxels, tmp_path):
    features, indices = cloud(voxels, SHAPE, 4, batch=2)
    filters = weights_of(kernel)
    file = autoware_file(
        tmp_path / 'a.onnx', filters, shape=SHAPE, stride=stride, padding=padding,
        dilation=dilation, subm=int(subm), batch=2, gemm=dict(is_subm=int(subm)),
    )  # fmt: skip
    found = ONNXRuntime(file)({'features': features, 'indices': indices})

    settings = dict(stride=stride, padding=padding, dilation=dilation, bias=False)
    layer = (SubMConv3d if subm else SparseConv3d)(4, 5, kernel, **settings)
    layer.weight.data = torch.from_numpy(filters)
    inputs = SparseConvTensor(torch.from_numpy(features), torch.from_numpy(indices), SHAPE, 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # spconv loses summands on more
    with torch.no_grad():
        wanted = layer(inputs)
    torch.set_num_threads(threads)
    places, values = _sorted(wanted.indices.numpy(), wanted.features.numpy())
    found_places, found_values = _sorted(found['out_inds'], found['made'])
    assert np.array_equal(found_places, places)
    np.testing.assert_allclose(found_values, values, atol=1e-5)
    assert found['count'].shape == () and found['count'] == len(places)
    order = found['out_inds'], found_places
    assert np.array_equal(*order) if not subm else np.array_equal(order[0], indices)
