"""docs/detectors.md: its table is what docs/detectors.json says, and that is what it promises."""

import json
import sys

from tests.small import ROOT

sys.path.insert(0, str(ROOT / 'benchmarks'))
from zoo.page import markdown, write_page  # noqa: E402

DOCS = ROOT / 'docs'
ROWS = json.loads((DOCS / 'detectors.json').read_text())


def test_the_table_is_that_of_the_numbers():
    assert markdown(ROWS) in (DOCS / 'detectors.md').read_text()


def test_every_model_keeps_what_the_page_promises():
    for row in ROWS:
        assert row['float_equal'] and row['reload_equal'], row['model']
        for file in row['files']:
            assert not file['lint'] and not file['unequal_ties'], row['model']
            assert file['layers']['transposed_float'] == 0
            for engine in ('onnxruntime', 'openvino'):
                assert file['engines'][engine]['worst_db'] >= 55, (row['model'], engine)


def test_what_went_wrong_is_in_the_table(tmp_path):
    file = dict(
        lint={'Q14': 2},
        engines={
            'onnxruntime': dict(worst_db=81.0, below=0),
            'openvino': dict(worst_db=40.0, below=3),
        },
        compiler=dict(accepted=False, error='no plugin', around_plugins=False),
    )
    row = dict(
        model='M', layers=3, quantized=2, share=0.9996, share_without_deformable=1,
        float_equal=True, reload_equal=False, files=[file],
    )  # fmt: skip
    page = tmp_path / 'page.md'
    page.write_text('a\n<!-- table of models: begin -->\nold\n<!-- table of models: end -->\nb\n')
    write_page([row, dict(model='N', error='ValueError: why')], page)
    text = page.read_text()
    assert text.startswith('a\n') and text.endswith('\nb\n') and 'old' not in text
    assert (
        '| M | 2/3 | > 99.9 % | 100.0 % | equal | **differs** | 81.0 dB | **40.0 dB**, 3 below '
        '| Q14 2 | **refused**: no plugin |'
    ) in text
    assert '| N | **ValueError: why** |' in text
