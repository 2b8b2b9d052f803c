"""looped: recurrent-depth Transformers, trained by unrolling or by denoising, measured over depth.

The public names are imported on first use, so `import looped` costs nothing.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "load_config": "looped.config",
    "Config": "looped.config",
    "UserError": "looped.errors",
    "Core": "looped.nn.recurrence",
    "RecurrentDepth": "looped.nn.recurrence",
    "attention": "looped.nn.attention",
    "Mask": "looped.nn.mask",
    "Table": "looped.nn.mask",
    "Causal": "looped.nn.bias",
    "Full": "looped.nn.bias",
    "Near": "looped.nn.bias",
    "Packed": "looped.nn.bias",
    "Padded": "looped.nn.bias",
    "SameDocument": "looped.nn.bias",
    "SlidingWindow": "looped.nn.bias",
    "Denoiser": "looped.diffusion.denoiser",
    "LoopedModel": "looped.diffusion.denoiser",
    "SAMPLERS": "looped.diffusion.samplers",
    "schedule": "looped.diffusion.schedules",
    "LanguageModel": "looped.models.language",
    "build": "looped.models.build",
    "build_objective": "looped.objectives",
    "count": "looped.cost.counts",
    "sample_depths": "looped.objectives.depth",
    "StepRandom": "looped.rng",
    "train": "looped.training.trainer",
    "load_run": "looped.training.runs",
    "evaluate_depth": "looped.evaluation.depth",
    "generate": "looped.inference.generate",
    "heldout_text": "looped.data.heldout",
    "read_results": "looped.evaluation.results",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'looped' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__():
    return sorted(__all__)
