"""Keys of an ONNX file's metadata that the writer and the engines share."""

#: How a file is typed; only a strongly typed one has it, with the value :data:`STRONG`.
TYPING_KEY = 'mmdet3d_quant.typing'
STRONG = 'strong'
