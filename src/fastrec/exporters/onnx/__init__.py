"""ONNX files of torch models: standard operators, or fastrec's own for ONNX Runtime."""
