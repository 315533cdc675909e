"""Limits of file formats."""

#: Bytes at which a protobuf message ends, and with it an ONNX file without weights beside it.
LARGEST = 2**31
