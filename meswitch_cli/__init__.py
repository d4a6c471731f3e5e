"""meswitch: serve a family of fine-tuned language models from one base."""

__version__ = "0.1.0"
