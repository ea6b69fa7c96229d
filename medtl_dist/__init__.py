"""Distributed transfer learning for medical image classification: plain PyTorch that has never heard of Ray."""

__version__ = "0.1.0"
