"""What a file is, by its bytes, where torch reads no checkpoint from it; and the remedy."""

from __future__ import annotations

import re
import tarfile
import zipfile
from collections.abc import Callable
from typing import BinaryIO

#: Bytes that are looked at.
_HEAD = 4096
_AGAIN = 'copy or download it again'
_UNPACK = 'unpack it and give the checkpoint inside'
#: First bytes -> what such a file is, and the remedy.
MAGIC = {
    b'ftrt': 'a TensorRT engine, which has no weights to load: give the checkpoint behind it',
    b'ptrt': 'a TensorRT engine, which has no weights to load: give the checkpoint behind it',
    b'\x89HDF': 'an HDF5 file, as Keras writes it: save the weights with torch.save',
    b'\x93NUMPY': 'a NumPy array: save the weights with torch.save',
    b'\x1f\x8b': f'a gzip archive: {_UNPACK}',
    b'BZh': f'a bzip2 archive: {_UNPACK}',
    b'\xfd7zXZ\0': f'an xz archive: {_UNPACK}',
    b'\x28\xb5\x2f\xfd': f'a zstd archive: {_UNPACK}',
    b'7z\xbc\xaf\x27\x1c': f'a 7z archive: {_UNPACK}',
    b'Rar!': f'a rar archive: {_UNPACK}',
}
#: Keys of the fields that follow the version in an ONNX model: producer, domain, graph ...
_ONNX_FIELDS = b'\x12\x1a\x22\x28\x32\x3a\x42'
#: Largest header of a safetensors file that is taken for one; text would claim 2**56 and more.
_HEADER = 2**40


def kind_of(file: BinaryIO) -> str | None:
    """Tells what a file is, if it is of a known kind that is no checkpoint.

    Args:
        file: Open for reading; nothing in it is executed.

    Returns:
        Such as ``'an empty file: copy or download it again'``; None if its kind is not known.
    """
    file.seek(0, 2)
    size = file.tell()
    file.seek(0)
    head = file.read(_HEAD)
    if not head.strip(b'\0'):
        return f'an empty file: {_AGAIN}' if not size else f'full of zeros at its start: {_AGAIN}'
    by_magic = next((what for magic, what in MAGIC.items() if head.startswith(magic)), None)
    looks: tuple[Callable[[], str | None], ...] = (
        lambda: by_magic,
        lambda: _pointer(head),
        lambda: _page(head),
        lambda: _onnx(head),
        lambda: _zip(file, head),
        lambda: _tar(file, head),
        lambda: _text(head),
    )
    return next((what for what in (look() for look in looks) if what), None)


def is_safetensors(file: BinaryIO) -> bool:
    """Whether a file begins as one of safetensors: length of a header, and its JSON."""
    file.seek(0)
    head = file.read(9)
    file.seek(0)
    return head[8:] == b'{' and int.from_bytes(head[:8], 'little') < _HEADER


def program_in(file: BinaryIO) -> str | None:
    """Tells which program a zip archive holds, which torch would run or refuse.

    Returns:
        ``'a TorchScript archive'``, ``'an archive of torch.export'`` or None.
    """
    if not zipfile.is_zipfile(file):
        return None
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    file.seek(0)
    if any(name.endswith('/constants.pkl') for name in names):
        return 'a TorchScript archive'
    if any(name.endswith(('archive_format', 'serialized_exported_program.json')) for name in names):
        return 'an archive of torch.export'
    return None


def _pointer(head: bytes) -> str | None:
    if not head.startswith(b'version https://git-lfs.github.com/spec/'):
        return None
    size = re.search(rb'^size (\d+)', head, re.MULTILINE)
    of = f' of {int(size[1]) / 1e6:.0f} MB' if size else ''
    return f'a git-lfs pointer{of} and not the file itself: run `git lfs pull` where it was cloned'


def _page(head: bytes) -> str | None:
    start = head.lstrip(b'\xef\xbb\xbf \t\r\n').lower()
    if start.startswith((b'<!doctype html', b'<html', b'<head')):
        title = re.search(rb'<title[^>]*>\s*([^<]{1,80})', head, re.IGNORECASE)
        named = f' ("{title[1].decode(errors="replace").strip()}")' if title else ''
        return (
            f'an HTML page{named}: the download failed; open its address in a browser, where it '
            'may ask for a login or a confirmation'
        )
    return 'an XML file, no checkpoint' if start.startswith(b'<?xml') else None


def _onnx(head: bytes) -> str | None:
    if head[0] == 8 and 0 < head[1] < 64 and head[2:3] in [bytes([b]) for b in _ONNX_FIELDS]:
        return (
            'an ONNX graph: tools/lint_onnx.py and tools/benchmark_onnx.py take it; here give the '
            'checkpoint that it was exported from'
        )
    return None


def _zip(file: BinaryIO, head: bytes) -> str | None:
    if not head.startswith(b'PK'):
        return None
    file.seek(0)
    if not zipfile.is_zipfile(file):
        size = file.seek(0, 2)
        return f'truncated: {size / 1e6:.1f} MB of an archive without its end; {_AGAIN}'
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    if any(name.endswith('data.pkl') for name in names):
        return None  # torch's own, damaged
    if names and all(name.endswith('.npy') for name in names):
        return 'a file of NumPy arrays (npz): save the weights with torch.save'
    return f'a zip archive ({_some(names)}): {_UNPACK}'


def _tar(file: BinaryIO, head: bytes) -> str | None:
    if head[257:262] != b'ustar':
        return None
    file.seek(0)
    names = []
    try:
        with tarfile.open(fileobj=file, mode='r:') as archive:
            names = archive.getnames()
    except tarfile.TarError:
        pass
    return f'a tar archive ({_some(names)}): {_UNPACK}'


def _text(head: bytes) -> str | None:
    text = head.decode('utf-8', errors='ignore')
    if len(text.encode()) < len(head) - 3 or not all(c.isprintable() or c.isspace() for c in text):
        return None
    line = text.strip().splitlines()[0][:60] if text.strip() else ''
    return (
        f'a text file that begins with {line!r}, no checkpoint; if it was downloaded, that failed'
    )


def _some(names: list[str]) -> str:
    return ', '.join(names[:3]) + (', ...' if names[3:] else '') if names else 'nothing readable'
