"""Files that are no checkpoint are called what they are; every kind of checkpoint is read."""

import gzip
import io
import json
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from mmdet3d_quant.files import kinds
from mmdet3d_quant.files.checkpoint import CheckpointError, load_from_one_door, read_checkpoint

STATE = nn.Linear(200, 200).state_dict()
LFS = b"""version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 412345678
"""


def saved(legacy=False):
    file = io.BytesIO()
    torch.save(dict(state_dict=STATE), file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def onnx_graph():
    """A graph as onnx writes it, without onnx: IR version 8, made by pytorch."""
    return b'\x08\x08\x12\x07pytorch\x1a\x052.1.0:\x04\n\x02\x0a\x00' + bytes(range(256))


def archive(kind, **members):
    file = io.BytesIO()
    if kind == 'tar':
        with tarfile.open(fileobj=file, mode='w') as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(f'{name}.pth')
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    elif kind == 'zip':
        with zipfile.ZipFile(file, 'w') as zipped:
            for name, data in members.items():
                zipped.writestr(f'{name}.pth', data)
    return file.getvalue()


def arrays():
    file = io.BytesIO()
    np.savez(file, weight=np.ones(3))
    return file.getvalue()


KINDS = {
    'empty': (lambda: b'', 'an empty file: copy or download it again'),
    'zeros': (lambda: bytes(9000), 'full of zeros at its start: .*download'),
    'lfs': (lambda: LFS, 'a git-lfs pointer of 412 MB .*git lfs pull'),
    'html': (
        lambda: b'\n<!DOCTYPE html>\n<html><head><title>Sign in - Drive</title></head></html>',
        r'an HTML page \("Sign in - Drive"\): the download failed',
    ),
    'xml': (lambda: b'<?xml version="1.0"?><Error>AccessDenied</Error>', 'an XML file'),
    'text': (lambda: b'Entry not found', "text file that begins with 'Entry not found'"),
    'config': (lambda: b'model = dict(type=3)\n', r"a text file that begins with 'model = dict\("),
    'onnx': (onnx_graph, 'an ONNX graph: tools/lint_onnx.py'),
    'engine': (lambda: b'ftrt\0\0\0\0' + bytes(100), 'a TensorRT engine'),
    'tar': (lambda: archive('tar', model=saved()), r'a tar archive \(model.pth\): unpack it'),
    'zip': (lambda: archive('zip', model=saved()), r'a zip archive \(model.pth\): unpack it'),
    'gzip': (lambda: gzip.compress(saved()), 'a gzip archive: unpack it'),
    'npz': (arrays, 'NumPy arrays'),
    'half': (lambda: saved()[:100_000], r'truncated: 0.1 MB of an archive without its end'),
    'half, legacy': (lambda: saved(legacy=True)[:100_000], 'truncated or damaged.*again'),
}  # fmt: skip


@pytest.mark.parametrize('name', KINDS)
def test_what_is_no_checkpoint_is_named(tmp_path, name):
    make, match = KINDS[name]
    path = tmp_path / 'bad.pth'
    path.write_bytes(make())
    for read in (read_checkpoint, lambda p: load_from_one_door(str(p))):
        with pytest.raises(CheckpointError, match=f'bad.pth is .*{match}'):
            read(path)


def test_a_real_onnx_graph_is_one(tmp_path):
    onnx = pytest.importorskip('onnx')
    node = onnx.helper.make_node('Relu', ['x'], ['y'])
    x, y = (onnx.helper.make_tensor_value_info(n, 1, [2]) for n in 'xy')
    model = onnx.helper.make_model(onnx.helper.make_graph([node], 'g', [x], [y]))
    onnx.save(model, str(tmp_path / 'g.onnx'))
    with pytest.raises(CheckpointError, match='an ONNX graph'):
        read_checkpoint(tmp_path / 'g.onnx')


def test_folders_and_programs_are_named(tmp_path):
    with pytest.raises(CheckpointError, match='is a folder'):
        read_checkpoint(tmp_path)
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / 's.pth')
    with pytest.raises(CheckpointError, match='TorchScript archive.*state_dict'):
        read_checkpoint(tmp_path / 's.pth')


@pytest.mark.parametrize('legacy', [False, True])
def test_every_form_of_torch_save_is_read(tmp_path, legacy):
    forms = {
        'bare': STATE,
        'dict': dict(state_dict=STATE, meta=dict(epoch=1)),
        'protocol 4': dict(state_dict=STATE),
    }
    for name, data in forms.items():
        how = dict(pickle_protocol=4) if name == 'protocol 4' else {}
        torch.save(data, tmp_path / name, _use_new_zipfile_serialization=not legacy, **how)
        found = read_checkpoint(tmp_path / name)
        assert all(torch.equal(found['state_dict'][k], v) for k, v in STATE.items()), name
        assert found['meta'] == (dict(epoch=1) if name == 'dict' else {})


def test_safetensors_are_read(tmp_path):
    library = pytest.importorskip('safetensors.torch')
    state = {**STATE, 'half': torch.ones(3).bfloat16(), 'scalar': torch.tensor(7)}
    library.save_file(state, str(tmp_path / 'c.safetensors'), metadata=dict(format='pt'))
    (tmp_path / 'c.pth').write_bytes((tmp_path / 'c.safetensors').read_bytes())
    for path in (tmp_path / 'c.safetensors', tmp_path / 'c.pth'):
        for found in (read_checkpoint(path), load_from_one_door(str(path))):
            found = found['state_dict']
            assert found.keys() == state.keys()
            assert all(
                torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in state.items()
            )


def header(data=bytes(8), length=None, **entry):
    entry = dict(dtype='F32', shape=[2], data_offsets=[0, 8], **entry) if entry is not None else {}
    text = json.dumps(dict(w=entry)).encode()
    return struct.pack('<Q', len(text) if length is None else length) + text + data


PLANTED = {
    'data cut off': lambda: header(data=bytes(4)),
    'more data than told': lambda: header(data=bytes(800)),
    'header longer than the file': lambda: header(length=10**9),
    'header shorter than its JSON': lambda: header(length=5),
    'offsets past the end': lambda: header().replace(b'[0, 8]', b'[0, 9]'),
    'offsets before the start': lambda: header().replace(b'[0, 8]', b'[-8, 0]'),
    'a shape of other size': lambda: header().replace(b'[2]', b'[3]'),
    'an unknown type': lambda: header().replace(b'F32', b'X32'),
    'no JSON': lambda: struct.pack('<Q', 8) + b'{' * 8,
}


@pytest.mark.parametrize('name', PLANTED)
def test_bad_headers_of_safetensors_are_refused(tmp_path, name):
    pytest.importorskip('safetensors')
    path = tmp_path / 'bad.safetensors'
    path.write_bytes(header())
    assert read_checkpoint(path)['state_dict']['w'].tolist() == [0, 0]  # so the others can fail
    path.write_bytes(PLANTED[name]())
    with pytest.raises(
        CheckpointError, match='bad.safetensors is a safetensors file, truncated or'
    ):
        read_checkpoint(path)


def test_safetensors_without_their_library_say_what_is_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'safetensors.torch', None)
    (tmp_path / 'c.safetensors').write_bytes(header())
    with pytest.raises(CheckpointError, match='c.safetensors is a .*pip install safetensors'):
        read_checkpoint(tmp_path / 'c.safetensors')


def test_a_checkpoint_is_none_of_the_kinds():
    """So a damaged one is called damaged."""
    for data in (saved(), saved(legacy=True)):
        assert kinds.kind_of(io.BytesIO(data)) is None
        assert not kinds.is_safetensors(io.BytesIO(data))
