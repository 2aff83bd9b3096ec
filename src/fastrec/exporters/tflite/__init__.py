"""ONNX graphs of fastrec as TFLite files: one operator for one, int8 with its very numbers."""
