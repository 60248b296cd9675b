"""The decision as an ONNX graph."""
