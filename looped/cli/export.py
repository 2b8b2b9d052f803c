"""`looped export`: write the model of a run as a folder for other libraries."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from looped.cli.eval import need_whole
from looped.cli.verb import Settings, Verb, check_range, no_settings


@dataclass
class Export(Verb):
    """Write the model of a run to a folder that transformers can load, with its tokenizer and a model card."""

    run: Positional[Path]
    """the folder of a run"""
    out: Path
    """the folder of the model, which must not exist"""
    to: str = "hf"
    """hf: needs this package to load, any depth, loops and denoisers. Without this package: llama, mistral, qwen2,
    qwen3 or olmo2, unrolled at one depth; nanbeige, for llama.cpp, SGLang and vLLM; huginn, for its own code"""
    num_steps: int | None = None
    """default loop or solver steps per token of the exported model; if not given, those of training"""
    licence: str | None = None
    """licence to name in the model card, e.g. apache-2.0"""
    step: int | None = None
    """export this checkpoint instead of the newest one"""
    raw: bool = False
    """use the last weights instead of the EMA weights (optim.ema_decay)"""

    def __call__(self, settings: Settings) -> None:
        no_settings(settings, "export")
        if self.num_steps is not None:
            check_range("--num-steps", self.num_steps)
        from looped.hub.exporting import export
        from looped.training.runs import load_run

        run = load_run(self.run, ema=not self.raw, step=self.step)
        need_whole(run, "can be exported")
        print(export(run, self.out, self.to, num_steps=self.num_steps, licence=self.licence))
