"""Values written as Python text read back as they were, in lines of limited length."""

from mmdet3d_quant.files.literals import assignment


def test_long_values_are_broken_and_read_back():
    plain = dict(
        example=[[(1, 2**i, 256 >> i, 256 >> i) for i in range(9)]],
        skip={f'{i} is no name': 'its reason, which is a long one ' * 9 for i in range(3)},
        one=(1,),
        none=None,
        empty={},
    )
    text = assignment('value', plain)
    assert max(map(len, text.splitlines())) <= 100
    found = {}
    exec(text, found)
    assert found['value'] == plain
