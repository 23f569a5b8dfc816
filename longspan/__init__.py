"""Longspan: long-context pretraining of Block-Recurrent and memory-augmented transformers."""

__version__ = "0.1.0"
