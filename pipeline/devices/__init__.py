"""Devices: what a profile says, what this machine is, and how the latency of an ONNX file is measured."""
