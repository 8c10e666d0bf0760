"""Policies as ONNX files: written by `bpkit export`, checked and run by the policy `onnx`."""
