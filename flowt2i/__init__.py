"""flowt2i: train a text-to-image model from scratch with flow matching, score it, sample from it, serve it."""

__version__ = "0.1.0"
__all__ = ["Pipeline", "__version__"]


def __getattr__(name: str):  # lazy: `flowt2i --help` must not import torch
    if name == "Pipeline":
        from flowt2i.pipeline import Pipeline

        return Pipeline
    raise AttributeError(name)
