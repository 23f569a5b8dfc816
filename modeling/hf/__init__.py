"""Hugging Face form of the models.

An export holds one configuration and one modeling file: `configuration_longspan.py` as it is, and mixers, stack
and model joined (`source.py`). So those four files may import only torch, transformers and one another.
"""
