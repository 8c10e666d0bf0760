"""Standard ONNX operators that an exported policy may use.

Networks of dense layers, comparisons, sums, look-ups. Not among them: loops and branches (`Loop`, `Scan`, `If`), random
numbers, sequences, strings, images and sound, and whatever exists to make large tensors from small ones
(`ConstantOfShape`, `Tile`, `Pad`, `Resize`, `OneHot`, `NonZero`). `Expand` and `Range` are, since torch writes them.
"""

from __future__ import annotations

_ARITHMETIC = """
    Abs Add Ceil Clip Div Erf Exp Floor Identity Log Max Mean Min Mod Mul Neg Pow Reciprocal Round Sign Sin Cos Sqrt Sub
    Sum
"""
_COMPARISONS = "And Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual Not Or Where Xor"
_ACTIVATIONS = """
    Celu Elu Gelu HardSigmoid HardSwish LeakyRelu LogSoftmax Mish PRelu Relu Selu Sigmoid Softmax Softplus Softsign Tanh
    ThresholdedRelu
"""
_LAYERS = "BatchNormalization Einsum Gemm LayerNormalization MatMul"
_REDUCTIONS = """
    ArgMax ArgMin CumSum ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
    ReduceSum ReduceSumSquare TopK
"""
_SHAPES = """
    Cast Concat Constant Expand Flatten Gather GatherElements GatherND Range Reshape ScatterElements ScatterND Shape
    Size Slice Split Squeeze Transpose Trilu Unsqueeze
"""

ALLOWED = frozenset(" ".join((_ARITHMETIC, _COMPARISONS, _ACTIVATIONS, _LAYERS, _REDUCTIONS, _SHAPES)).split())

BY_SHAPE = {"Expand": 1, "Range": 1}
"""Operators whose output is as large as the values of an input say, and the place of that input."""
