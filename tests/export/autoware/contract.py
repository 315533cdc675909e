"""What Autoware's plugins and node are published to take, written down by hand."""

from onnx import AttributeProto, TensorProto

INT, INTS, FLOAT = AttributeProto.INT, AttributeProto.INTS, AttributeProto.FLOAT
F16, F32, I32, I64 = (
    TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64,
)  # fmt: skip
DOMAIN = 'autoware'
#: Types of attributes by operator.
ATTRIBUTES = {
    'GetIndicePairsImplicitGemm': dict(
        batch_size=INT, spatial_shape=INTS, algo=INT, ksize=INTS, stride=INTS, padding=INTS,
        dilation=INTS, out_padding=INTS, subm=INT, transpose=INT, is_train=INT, do_sort=INT,
    ),
    'ImplicitGemm': dict(
        act_alpha=FLOAT, act_beta=FLOAT, is_subm=INT, is_train=INT, fp32_accum=INT,
        output_scale=FLOAT, output_add_scale=FLOAT, act_type=INT,
    ),
    'QuickCumsumCuda': dict(batch_size=INT, dimension=INT, height=INT, width=INT),
}  # fmt: skip
#: More of a layer in INT8.
INT8 = dict(precision=INT, input_scale=FLOAT)
#: Inputs and outputs of the body: types, and sizes, a name where a frame decides.
VOXELS = dict(
    voxels=(F32, ['voxels_num', 10, 5]),
    coors=(I32, ['voxels_num', 3]),
    num_points_per_voxel=(I32, ['voxels_num']),
)


def boxes(proposals):
    return dict(
        bbox_pred=(F32, [10, proposals]), score=(F32, [proposals]), label_pred=(I64, [proposals])
    )


def ports(values):
    return {
        v.name: (
            v.type.tensor_type.elem_type,
            [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
        )
        for v in values
    }


def types_of(node):
    return {a.name: a.type for a in node.attribute}
