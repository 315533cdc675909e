"""What torch.compile makes of quantized blocks: values, and what is kept for the backward pass."""

import copy

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from mmdet.models.backbones.resnet import Bottleneck
from torch import nn
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor.decomposition import select_decomp_table

from mmdet3d_quant import calibrate, quantizers
from mmdet3d_quant.core.modes import float_state_dict
from mmdet3d_quant.core.ties import share_ranges, ties
from mmdet3d_quant.models.resnet import QuantBottleneck

pytestmark = [
    pytest.mark.usefixtures('same_optimizers'),
    pytest.mark.skipif(
        tuple(map(int, torch.__version__.split('.')[:2])) < (2, 8),
        reason='the partitioner of an older torch keeps more',
    ),
]
CHANNELS, BATCH = 64, 2


def stage(kind):
    torch.manual_seed(0)
    blocks = nn.Sequential(*(kind(CHANNELS, CHANNELS // 4) for _ in range(2)))
    for module in blocks.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
    return blocks.eval()


def quantized(learned=False):
    blocks = stage(QuantBottleneck)
    calibrate(blocks, [image()], 'percentile:99')
    if learned:
        for quantizer in quantizers(blocks).values():
            if quantizer.spec.axis is None:
                quantizer.learn()
    share_ranges(blocks)
    return blocks


def image():
    return torch.randn(BATCH, CHANNELS, 16, 16, generator=torch.Generator().manual_seed(1))


def results(net, run):
    net.zero_grad()
    y = run(image().to(next(net.parameters()).dtype))
    y.square().mean().backward()
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    for group in ties(net):  # of one tensor in compiled code, its first member has the gradient
        members = [found.pop(f'{name}._amax', None) for name in group]
        grads = [grad for grad in members if grad is not None]
        if grads:
            found[f'{group[0]}._amax'] = torch.stack(grads).sum(0)
    return dict(found, output=y.detach())


def kept(net):
    """Bytes of activations that compiled code keeps from the forward to the backward pass."""
    found = []

    def forward(graph, _):
        *_, output = graph.graph.nodes
        nodes = {n for n in output.args[0] if isinstance(n, torch.fx.Node)}
        values = [n.meta['val'] for n in nodes if n.op != 'placeholder']
        found.extend(v for v in values if isinstance(v, torch.Tensor) and v.dim() == 4)
        return make_boxed_func(graph.forward)

    def backend(graph, inputs):
        return aot_module_simplified(
            graph,
            inputs,
            fw_compiler=forward,
            bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
            decompositions=select_decomp_table(),
            partition_fn=min_cut_rematerialization_partition,
        )

    torch._dynamo.reset()
    torch.compile(net, backend=backend, fullgraph=True)(image())
    return sum(v.numel() * v.element_size() for v in found if v.shape[0] == BATCH)


@pytest.mark.parametrize('learned', [False, True])
def test_compiled_code_keeps_what_a_float_model_keeps(learned):
    blocks = quantized(learned)
    plain = stage(Bottleneck)
    plain.load_state_dict(float_state_dict(blocks))
    # the first input, rounded, and the mask of the last sum, of which nobody reads the result
    more = image().numel() * (4 + 1)
    assert kept(blocks) <= kept(plain) + more


@pytest.mark.parametrize('learned', [False, True])
def test_tied_ranges_are_one_in_compiled_code_until_one_is_set(learned):
    blocks = quantized(learned).double()  # so that no value is rounded the other way
    wanted = results(blocks, blocks)
    torch._dynamo.reset()
    run = torch.compile(blocks, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(results(blocks, run), wanted)
    first, other = blocks[1].conv1._input_quantizer, blocks[1].residual_quantizer
    assert (other._amax.grad is None or not learned) and first.equals is other.equals
    other.amax = other.amax * 0.5
    assert not first.equals
    assert copy.deepcopy(blocks)[0].residual_quantizer.equals  # another group
    torch.testing.assert_close(results(blocks, run), results(blocks, blocks))
    assert not learned or other._amax.grad is not None
