"""`looped generate`: continue text or generate images with a trained run."""

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from looped.cli.eval import need_whole
from looped.cli.verb import Settings, Verb, check_range
from looped.config import Config
from looped.config.unread_settings import notice
from looped.errors import UserError

if TYPE_CHECKING:
    from looped.domains.base import Domain

OF_WHAT = dict.fromkeys(("prompt", "prompts", "num_tokens", "temperature", "top_k", "top_p", "stop", "past_the_end",
                         "json"), "text") | dict.fromkeys(("guidance", "out"), "images")
"""Flag -> the kind of run it applies to."""


@dataclass
class Generate(Verb):
    """Continue one or more texts with a trained run, at any depth. If the run generates images, write one picture with
    a row of images per class."""

    run: Positional[Path]
    """the folder of a run"""
    prompt: str = "\n"
    """the text to continue; - reads it from stdin"""
    prompts: Path | None = None
    """a file with one prompt per line instead (empty lines are skipped); all are continued in one batch, each as it
    would be alone"""
    depth: int | None = None
    """loop or solver steps per token, for masked diffusion unmasking steps of the whole text; if not given, the number
    that the run was trained for, or recurrence.mean steps of a solver"""
    num_tokens: int = 128
    """tokens to generate"""
    num_samples: int = 1
    """continuations per prompt, or images per class"""
    temperature: float = 1.0
    """sampling temperature; 0 always takes the most likely token"""
    top_k: int | None = None
    """sample only from the k most likely tokens"""
    top_p: float = 1.0
    """sample only from the most likely tokens that together have this probability"""
    stop: tuple[str, ...] = ()
    """strings, as in --stop END '###'; the first that is generated ends its text and is left out of it, as an
    end-of-text token always does"""
    past_the_end: bool = False
    """generate all tokens, continuing with another document after an end-of-text token"""
    device: str = "auto"
    """auto (the best available of cuda, mps, cpu), cpu, cuda, cuda:1 or mps"""
    dtype: str = "fp32"
    """fp32, or bf16 or fp16 under autocast"""
    step: int | None = None
    """use this checkpoint instead of the newest one"""
    json: bool = False
    """print JSON lines {prompt, depth, text}"""
    guidance: float | None = None
    """images: scale of classifier-free guidance, where 1 is none; if not given, denoise.guidance"""
    out: Path | None = None
    """images: file of the picture; if not given, grid.png"""

    def __call__(self, settings: Settings) -> None:
        for name in ("depth", "num_tokens", "num_samples"):
            if getattr(self, name) is not None:
                check_range(f"--{name.replace('_', '-')}", getattr(self, name))
        from looped.devices import Placement
        from looped.domains import domain_of
        from looped.domains.base import Request
        from looped.training.runs import load_run

        place = Placement.of(self.device, self.dtype)
        run = load_run(self.run, step=self.step, settings=settings, device=place.device)
        notice(run.config, settings)
        domain = domain_of(run.config)
        need_whole(run, domain.makes or "writes text")
        if domain.makes:
            self._check(domain, run.config)
        asked = {field.name: getattr(self, field.name) for field in fields(Request)[1:]}
        request = Request(self._texts, **asked | {"depth": self.depth or run.config.sample_depth})
        with place.at_work(run.config.training.threads):
            for line in domain.generate(run, request):
                print(line)

    def _check(self, domain: "Domain", config: Config) -> None:
        """Raises UserError for flags that apply to another kind of run."""
        for name, what in OF_WHAT.items():
            if name not in domain.asks and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise UserError(f"--{name.replace('_', '-')} is for {what}, and {self.run} {domain.does(config)}; "
                                f"leave it out")

    def _texts(self) -> list[str]:
        """The prompts. Raises UserError for an unreadable file or an invalid prompt."""
        from looped.data.prompts import check_prompt, read_piped, read_prompts

        if self.prompts is not None:
            if self.prompt != "\n":
                raise UserError(f"--prompt and --prompts {self.prompts} are both given; leave one out")
            return read_prompts(self.prompts)
        return [read_piped(sys.stdin.buffer) if self.prompt == "-" else check_prompt(self.prompt)]
