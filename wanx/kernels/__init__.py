"""The hot spots of the model, one op a file: fp32 reference, torch op, ONNX function."""
