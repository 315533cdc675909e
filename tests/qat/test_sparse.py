"""Training a quantized sparse encoder: its weights, ranges that follow, ranges that are learned."""

import torch

import mmdet3d_quant as mq
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.ties import unequal_ties
from mmdet3d_quant.layers.base import QuantLayer
from mmdet3d_quant.qat import LearnedRanges, WeightRanges
from mmdet3d_quant.qat.distill import distance
from tests.models.small import build, cloud


def test_an_encoder_with_ranges_that_are_too_wide_finds_back_to_its_float_self():
    floating, model = build(learn_amax=True)
    batches = [cloud(count=80, seed=s) for s in range(2)]
    mq.calibrate(model, batches)
    found = mq.quantizers(model)
    for quantizer in found.values():
        if quantizer.learned:
            quantizer.amax = quantizer.amax * 16
    with torch.no_grad():
        wanted = [floating(*batch) for batch in batches]

    def error():
        return sum(distance(model(*b), w) for b, w in strict_zip(batches, wanted))

    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLayer)}
    weights = {n: (m.weight, m.weight.detach().clone()) for n, m in layers.items()}
    before = {n: q.amax.clone() for n, q in found.items() if q.learned}
    following, learned = WeightRanges(model), LearnedRanges(model)
    optimizer = torch.optim.Adam(
        [
            dict(params=[w for w, _ in weights.values()], lr=1e-4),
            dict(params=[q._amax for q in found.values() if q.learned], lr=0.15),
        ]
    )
    learned.attach(optimizer)
    start = error().item()
    for _ in range(15):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
        following.follow()
    assert error().item() < start / 3
    assert unequal_ties(model) == []
    for name, layer in layers.items():
        weight, old = weights[name]
        assert layer.weight is weight and not torch.equal(weight, old)
        if layer._weight_quantizer.float_reason is None:
            grid = layer._weight_quantizer(weight)
            assert (weight != grid).float().mean() > 0.9
            share = layer._weight_quantizer.amax / layer.weight_amax()
            torch.testing.assert_close(share, torch.ones_like(share))
    assert before and all(found[n].amax != amax for n, amax in before.items())
