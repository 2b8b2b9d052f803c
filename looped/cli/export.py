"""`looped export`: a run as a model's folder; what is heavy is imported in place."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from looped.cli.eval import need_whole
from looped.cli.verb import Settings, Verb, check_range, no_settings


@dataclass
class Export(Verb):
    """Write the model of a run to a folder that transformers reads, with its tokenizer and a model card."""

    run: Positional[Path]
    """the folder of a run"""
    out: Path
    """the folder of the model, which must not exist"""
    to: str = "hf"
    """hf: read with this package, at any depth, loops and denoisers. Without it: llama, mistral, qwen2, qwen3, olmo2,
    unrolled at one depth; nanbeige, which llama.cpp, SGLang and vLLM run; huginn, for its own code"""
    num_steps: int | None = None
    """loop or solver steps per token where none are asked for; those of training if not given"""
    licence: str | None = None
    """as the model card says it, for instance apache-2.0"""
    step: int | None = None
    """export this checkpoint instead of the newest one"""
    raw: bool = False
    """the last weights instead of the averaged ones (optim.ema_decay)"""

    def __call__(self, settings: Settings) -> None:
        no_settings(settings, "export")
        if self.num_steps is not None:
            check_range("--num-steps", self.num_steps)
        from looped.hub.exporting import export
        from looped.training.runs import load_run

        run = load_run(self.run, ema=not self.raw, step=self.step)
        need_whole(run, "is a model to export")
        print(export(run, self.out, self.to, num_steps=self.num_steps, licence=self.licence))
