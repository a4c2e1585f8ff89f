"""meditron-train: continue the pretraining of Llama-2 on medical text, on any number of GPUs or on a laptop."""

__version__ = "0.1.0"
