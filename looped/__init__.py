"""looped: recurrent-depth Transformers, trained by unrolling or by denoising, evaluated over depth.

The public names are imported on first use, so `import looped` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors read; tests/test_types.py compares it with the table
    from looped.config import Config as Config
    from looped.config import load_config as load_config
    from looped.cost.counts import count as count
    from looped.data.eval_text import heldout_text as heldout_text
    from looped.diffusion.denoiser import Denoiser as Denoiser
    from looped.diffusion.denoiser import LoopedModel as LoopedModel
    from looped.diffusion.noise import LogNormal as LogNormal
    from looped.diffusion.noise import LogUniform as LogUniform
    from looped.diffusion.noise import partition as partition
    from looped.diffusion.samplers import SAMPLERS as SAMPLERS
    from looped.diffusion.schedules import schedule as schedule
    from looped.errors import UserError as UserError
    from looped.evaluation.dataframes import read_results as read_results
    from looped.evaluation.depth_sweep import evaluate_depth as evaluate_depth
    from looped.evaluation.early_exit import losses_with_exits as losses_with_exits
    from looped.evaluation.intervals import documents_of as documents_of
    from looped.evaluation.likelihood import token_losses_by_depth as token_losses_by_depth
    from looped.inference.exits import Exit as Exit
    from looped.inference.generate import generate as generate
    from looped.models.build import build as build
    from looped.models.language import LanguageModel as LanguageModel
    from looped.nn.attention import attention as attention
    from looped.nn.blocks import Core as Core
    from looped.nn.depth_sampling import sample_depths as sample_depths
    from looped.nn.injection import LinearInjection as LinearInjection
    from looped.nn.mask_base import Mask as Mask
    from looped.nn.mask_base import Table as Table
    from looped.nn.masks import Causal as Causal
    from looped.nn.masks import Full as Full
    from looped.nn.masks import Near as Near
    from looped.nn.masks import Packed as Packed
    from looped.nn.masks import Padded as Padded
    from looped.nn.masks import SameDocument as SameDocument
    from looped.nn.masks import SlidingWindow as SlidingWindow
    from looped.nn.recurrence import RecurrentDepth as RecurrentDepth
    from looped.objectives import build_objective as build_objective
    from looped.rng import StepRandom as StepRandom
    from looped.training.runs import load_run as load_run
    from looped.training.train import open_trainer as open_trainer
    from looped.training.train import train as train

__version__ = "0.1.0"

_PUBLIC = {
    "load_config": "looped.config",
    "Config": "looped.config",
    "UserError": "looped.errors",
    "Core": "looped.nn.blocks",
    "RecurrentDepth": "looped.nn.recurrence",
    "LinearInjection": "looped.nn.injection",
    "attention": "looped.nn.attention",
    "Mask": "looped.nn.mask_base",
    "Table": "looped.nn.mask_base",
    "Causal": "looped.nn.masks",
    "Full": "looped.nn.masks",
    "Near": "looped.nn.masks",
    "Packed": "looped.nn.masks",
    "Padded": "looped.nn.masks",
    "SameDocument": "looped.nn.masks",
    "SlidingWindow": "looped.nn.masks",
    "Denoiser": "looped.diffusion.denoiser",
    "LoopedModel": "looped.diffusion.denoiser",
    "LogNormal": "looped.diffusion.noise",
    "LogUniform": "looped.diffusion.noise",
    "partition": "looped.diffusion.noise",
    "SAMPLERS": "looped.diffusion.samplers",
    "schedule": "looped.diffusion.schedules",
    "LanguageModel": "looped.models.language",
    "build": "looped.models.build",
    "build_objective": "looped.objectives",
    "count": "looped.cost.counts",
    "sample_depths": "looped.nn.depth_sampling",
    "StepRandom": "looped.rng",
    "train": "looped.training.train",
    "open_trainer": "looped.training.train",
    "load_run": "looped.training.runs",
    "evaluate_depth": "looped.evaluation.depth_sweep",
    "token_losses_by_depth": "looped.evaluation.likelihood",
    "losses_with_exits": "looped.evaluation.early_exit",
    "documents_of": "looped.evaluation.intervals",
    "Exit": "looped.inference.exits",
    "generate": "looped.inference.generate",
    "heldout_text": "looped.data.eval_text",
    "read_results": "looped.evaluation.dataframes",
}
__all__ = [*_PUBLIC, "__version__"]


if not TYPE_CHECKING:  # to checkers, every name that is not above is a mistake
    def __getattr__(name: str) -> Any:
        if name not in _PUBLIC:
            raise AttributeError(f"module 'looped' has no attribute '{name}'")
        try:
            return getattr(importlib.import_module(_PUBLIC[name]), name)
        except ModuleNotFoundError as error:
            if str(error.name).partition(".")[0] == "looped":
                raise
            raise ModuleNotFoundError(f"looped.{name} needs {error.name}, which is not installed; install looped with "
                                      f"its dependencies (pip without --no-deps); looped.nn and the solvers do without",
                                      name=error.name) from None


def __dir__() -> list[str]:
    return sorted(__all__)
