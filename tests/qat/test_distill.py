"""Distillation: zero for a float student, the right number for a quantized one, and it teaches."""

import pytest
import torch

import mmdet3d_quant as mq
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.core.modes import float_state_dict
from mmdet3d_quant.files.checkpoint import read_checkpoint
from mmdet3d_quant.improve import equalize_layers
from mmdet3d_quant.improve.recorded import MOVED, MOVES
from mmdet3d_quant.jobs.steps import BEFORE, BY_NAME, STEPS
from mmdet3d_quant.qat.distill import distance
from tests.qat.toy import QAT, Points, Toy, calibrated, runner


@pytest.fixture(scope='module')
def start(tmp_path_factory):
    return calibrated(tmp_path_factory.mktemp('start') / 'int8.pth')


def hook(start, **modules):
    return dict(type='DistillHook', checkpoint=str(start), modules=modules or {'norm': 2.0})


def test_distance_is_the_mean_share_of_the_error():
    torch.manual_seed(0)
    a, b = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    wanted = sum(((x - y) ** 2).sum() / (y**2).sum() for x, y in strict_zip(a, b)) / 3
    assert distance(a, b).item() == pytest.approx(wanted.item())
    nested = distance([a, dict(x=(b, torch.arange(3)))], [b, dict(x=(b, torch.arange(3)))])
    assert nested.item() == pytest.approx(wanted.item() / 2)
    with pytest.raises(ValueError, match='equal shapes'):
        distance(a, b[:2])


def losses_of_first_step(tmp_path, start, hooks, mode='quant'):
    schedule = dict(QAT, schedule={0: {'*': mode}})
    run = runner(tmp_path / mode, start, [schedule, *hooks], epochs=1)
    forward, caught = run.model.parse_losses, []

    def parse(losses):
        caught.append({k: v.item() for k, v in losses.items()})
        return forward(losses)

    run.model.parse_losses = parse
    run.train()
    return caught[0]


def test_a_float_student_has_nothing_to_learn(tmp_path, start):
    losses = losses_of_first_step(tmp_path, start, [hook(start)], 'float')
    assert losses['loss_distill_norm'] == 0 and losses['loss'] > 0


def test_the_loss_is_the_reciprocal_of_the_sqnr_times_its_weight(tmp_path, start):
    losses = losses_of_first_step(tmp_path, start, [hook(start, norm=2.0, head=1.0)])
    assert 0 < losses['loss_distill_norm'] < 0.1 and losses['loss_distill_head'] > 0
    model = Toy()
    model.load_state_dict(torch.load(start, weights_only=True)['state_dict'])
    model.eval()
    images, outputs = Points().images, {}
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))[:4]  # the sampler's
    for mode in ('float', 'quant'):
        handle = model.norm.register_forward_hook(
            lambda m, a, out, mode=mode: outputs.update({mode: out})
        )
        with mq.set_mode(model, mode), torch.no_grad():
            model(images[order])
        handle.remove()
    wanted = 2 * distance(outputs['quant'], outputs['float']).item()
    assert losses['loss_distill_norm'] == pytest.approx(wanted, rel=1e-4)


def test_the_teacher_is_neither_trained_nor_saved(tmp_path, start):
    run = runner(tmp_path, start, [QAT, hook(start)])
    run.train()
    teacher = next(h for h in run.hooks if type(h).__name__ == 'DistillHook').teacher
    before = torch.load(start, weights_only=True)['state_dict']
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    saved = torch.load(tmp_path / 'epoch_2.pth', weights_only=False)['state_dict']
    assert saved.keys() == before.keys()


def test_distillation_alone_pulls_the_student_back(tmp_path, start):
    """The weights are ruined; without labels, the float model repairs them."""
    state = torch.load(start, weights_only=True)['state_dict']
    torch.manual_seed(0)
    state['a.weight'] += 0.1 * torch.randn(state['a.weight'].shape)
    torch.save(dict(state_dict=state), tmp_path / 'ruined.pth')
    run = runner(tmp_path / 'run', tmp_path / 'ruined.pth', [QAT, hook(start, join=1.0)], epochs=40)
    run.model.parse_losses = lambda losses: (losses['loss_distill_join'], dict(losses))
    errors = []
    images = Points().images
    teacher = Toy()
    teacher.load_state_dict(torch.load(start, weights_only=True)['state_dict'])

    def error():
        out = {}
        for name, model in (('student', run.model), ('teacher', teacher)):
            handle = model.join.register_forward_hook(
                lambda m, a, o, name=name: out.update({name: o})
            )
            with torch.no_grad():
                model.eval()(images)
            handle.remove()
        return distance(out['student'], out['teacher']).item()

    run.load_or_resume()
    errors.append(error())
    run.train()
    errors.append(error())
    assert errors[1] < errors[0] / 5


def test_bad_input(tmp_path, start):
    with pytest.raises(ValueError, match='a, b, join, norm'):
        runner(tmp_path, start, [QAT, hook(start, neck=1.0)]).train()
    with pytest.raises(ValueError, match='weights > 0'):
        runner(tmp_path, start, [QAT, hook(start, norm=0.0)])


@pytest.fixture(scope='module')
def equalized(tmp_path_factory):
    """A float checkpoint, and the calibrated one with factors moved; of the notes the moves."""
    folder = tmp_path_factory.mktemp('equalized')
    torch.manual_seed(0)
    model, images = Toy().eval(), Points().images
    with torch.no_grad():
        model.norm.weight *= 2.0 ** torch.arange(8)
    torch.save(dict(state_dict=float_state_dict(model)), folder / 'float.pth')
    result = equalize_layers(model, [images], ['head'], lambda m, x: m(x))
    assert [move.source for move in result.moves] == ['norm']
    mq.calibrate(model, [images])
    meta = dict(layers_equalized=[move.plain() for move in result.moves])
    torch.save(dict(state_dict=model.state_dict(), meta=meta), folder / 'int8.pth')
    return folder


@pytest.mark.parametrize('teacher', ['float.pth', 'int8.pth'])
def test_factors_that_calibration_moved_are_moved_in_a_float_teacher(tmp_path, equalized, teacher):
    """A float student of the calibrated checkpoint differs in nothing from either teacher."""
    hooks = [hook(equalized / teacher)]
    losses = losses_of_first_step(tmp_path, equalized / 'int8.pth', hooks, 'float')
    assert losses['loss_distill_norm'] == 0 and losses['loss'] > 0


def test_training_goes_on_with_the_notes_of_the_moves(tmp_path, equalized):
    runner(tmp_path / 'run', equalized / 'int8.pth', [QAT], epochs=1).train()
    before, after = (
        read_checkpoint(path)['meta']['layers_equalized']
        for path in (equalized / 'int8.pth', tmp_path / 'run' / 'epoch_1.pth')
    )
    assert before == after


def test_a_teacher_that_is_no_float_model_is_told(tmp_path, start, equalized, caplog):
    with pytest.raises(QuantError, match='int8.pth that were not in the model.*: name the float'):
        runner(tmp_path / 'a', start, [QAT, hook(equalized / 'int8.pth')]).train()
    given = read_checkpoint(start)
    for meta, text in (
        (dict(smoothed=[dict(source='norm', factors=[3.0], readers=[])]), 'has no move'),
        (
            dict(smoothed=[dict(source='neck', factors=[2.0], readers=[])]),
            "'neck', which the model",
        ),
    ):
        torch.save(dict(given, meta=meta), tmp_path / 'odd.pth')
        with pytest.raises(QuantError, match=text):
            runner(tmp_path / 'b', start, [QAT, hook(tmp_path / 'odd.pth')]).train()
    short = dict(source='norm', factors=[2.0] * 3, readers=[dict(layer='head', channels=None)])
    torch.save(dict(given, meta=dict(smoothed=[short])), tmp_path / 'short.pth')
    with pytest.raises(QuantError, match='notes of the checkpoint that is trained do not fit'):
        runner(tmp_path / 'd', tmp_path / 'short.pth', [QAT, hook(start)]).train()
    torch.save(dict(given, meta=dict(norms_reestimated=['norm'])), tmp_path / 'moved.pth')
    run = runner(tmp_path / 'c', start, [QAT, hook(tmp_path / 'moved.pth')], epochs=1)
    run.logger.addHandler(caplog.handler)
    run.train()
    assert 'moved.pth is not the float model' in caplog.text
    assert 'norms_reestimated' in caplog.text


def test_notes_that_it_reads_are_those_that_steps_write():
    notes = {step.meta for step in STEPS}
    assert {*MOVES, *MOVED} <= notes and {BY_NAME[name].meta for name in BEFORE} == set(MOVES)
    assert notes - {*MOVES, *MOVED} == {'ranges_moved', 'empty_cells'}  # float is the same
