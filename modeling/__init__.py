"""Layers, mixers, models and the state protocol; the Hugging Face form in `hf/`."""
