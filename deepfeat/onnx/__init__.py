"""Fitted estimators as ONNX files, for programs without torch and scikit-learn."""

from ._export import export

__all__ = ["export"]
