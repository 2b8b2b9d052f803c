"""`looped generate`: text continued, or images made, by a trained run at any depth; what is heavy is imported in place.
"""

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from looped.cli.eval import need_whole
from looped.cli.verb import Settings, Verb, check_range
from looped.config import Config
from looped.config.reads import notice
from looped.errors import UserError

if TYPE_CHECKING:
    from looped.domains.base import Domain

OF_WHAT = dict.fromkeys(("prompt", "prompts", "num_tokens", "temperature", "top_k", "top_p", "stop", "past_the_end",
                         "json"), "text") | dict.fromkeys(("guidance", "out"), "images")
"""Flag -> what it is for."""


@dataclass
class Generate(Verb):
    """Continue a text with a trained run, at any depth; or many texts at once. Of a run that makes images, write a
    picture with a row of them for each class."""

    run: Positional[Path]
    """the folder of a run"""
    prompt: str = "\n"
    """the text to continue; - reads it from stdin"""
    prompts: Path | None = None
    """a file with a prompt a line instead (empty lines are passed over): all are continued in one batch, each as it
    would be alone"""
    depth: int = 8
    """loop or solver steps a token; of masked diffusion, the unmasking steps of the whole text"""
    num_tokens: int = 128
    """tokens to write"""
    num_samples: int = 1
    """continuations, or images of each class"""
    temperature: float = 1.0
    """below 1 keeps to likely tokens; 0 takes the likeliest alone"""
    top_k: int | None = None
    """only the k likeliest tokens"""
    top_p: float = 1.0
    """only the likeliest tokens that together hold this share"""
    stop: tuple[str, ...] = ()
    """strings that end a text where it says one of them, which is left out; an end of text always does"""
    past_the_end: bool = False
    """write all tokens, on past an end of text into another document"""
    device: str = "auto"
    """auto (the best there is: cuda, mps, cpu), cpu, cuda, cuda:1 or mps"""
    dtype: str = "fp32"
    """fp32, or bf16 or fp16 under autocast"""
    step: int | None = None
    """use this checkpoint instead of the newest one"""
    json: bool = False
    """print JSON lines {prompt, depth, text}"""
    guidance: float | None = None
    """of images: classifier-free guidance; 1 is the plain class; denoise.guidance if not given"""
    out: Path | None = None
    """of images: the picture; grid.png if not given"""

    def __call__(self, settings: Settings) -> None:
        for name in ("depth", "num_tokens", "num_samples"):
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
        request = Request(self._texts, **{field.name: getattr(self, field.name) for field in fields(Request)[1:]})
        with place.at_work(run.config.training.threads):
            for line in domain.generate(run, request):
                print(line)

    def _check(self, domain: "Domain", config: Config) -> None:
        """Raises UserError for flags of another kind of run."""
        for name, what in OF_WHAT.items():
            if name not in domain.asks and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise UserError(f"--{name.replace('_', '-')} is for {what}, and {self.run} {domain.does(config)}; "
                                f"leave it out")

    def _texts(self) -> list[str]:
        """The prompts. Raises UserError for a file that is none."""
        from looped.data.prompts import check_prompt, read_piped, read_prompts

        if self.prompts is not None:
            return read_prompts(self.prompts)
        return [read_piped(sys.stdin.buffer) if self.prompt == "-" else check_prompt(self.prompt)]
