"""`looped generate`: text continued, or images made, by a trained run at any depth; what is heavy is imported in place.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from looped.cli.eval import need_whole
from looped.cli.verb import Settings, Verb, check_range
from looped.config.reads import notice
from looped.errors import UserError


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
        from looped.training.runs import load_run

        place = Placement.of(self.device, self.dtype)
        run = load_run(self.run, step=self.step, settings=settings, device=place.device)
        notice(run.config, settings)
        need_whole(run, "makes images" if run.config.generates else "writes text")
        with place.at_work(run.config.training.threads):
            (self._make_images if run.config.generates else self._write_text)(run)

    def _write_text(self, run) -> None:
        """All prompts in one batch."""
        import torch

        from looped.inference.generate import generate
        from looped.inference.texts import Ending, as_lists

        self._refuse(("guidance", "out"), "images", "makes none")
        if run.config.is_task or run.config.is_images:
            does = f"solves {run.config.task.name}" if run.config.is_task else "names what is on images"
            raise UserError(f"{self.run} {does} and writes no text; look at its answers with looped eval {self.run}")
        prompts = [prompt for prompt in self._texts() for _ in range(self.num_samples)]
        ids = [torch.tensor(run.tokenizer.encode(prompt), dtype=torch.long) for prompt in prompts]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        tokens = generate(run.objective, padded.to(run.device), lengths=torch.tensor([len(row) for row in ids]),
                          num_tokens=self.num_tokens, depth=self.depth, temperature=self.temperature,
                          top_k=self.top_k, top_p=self.top_p, seed=run.config.seed, stop=self.stop,
                          decode=run.tokenizer.decode, past_the_end=self.past_the_end)
        ending = Ending(stop=self.stop, decode=run.tokenizer.decode)
        for prompt, text in zip(prompts, map(run.tokenizer.decode, as_lists(tokens)), strict=True):
            line = {"prompt": prompt, "depth": self.depth, "text": (text := ending.without_stop(text))}
            print(json.dumps(line) if self.json else prompt + text + "\n" * (len(prompts) > 1))

    def _make_images(self, run) -> None:
        """A row a class."""
        self._refuse(("prompt", "prompts", "num_tokens", "temperature", "top_k", "top_p", "stop", "past_the_end",
                      "json"), "text", "makes images")
        guidance = run.config.denoise.guidance if self.guidance is None else self.guidance
        if not 0 <= guidance < math.inf:
            raise UserError(f"--guidance {guidance} is negative or not a number; use 1 for the plain class")
        from looped.evaluation.image_samples import grid_of_classes, write_picture
        from looped.inference.rollout import rollout_of

        path = self.out or Path("grid.png")
        picture = grid_of_classes(run.objective, run.scale, self.depth, self.num_samples, guidance=guidance,
                                  seed=run.config.seed, batch_size=run.config.evaluation.batch_size)
        write_picture(picture, path)
        cost = rollout_of(run.objective).image_cost(self.depth, guidance)
        print(f"{path}: a row each of {', '.join(run.class_names)}; {self.depth} solver steps, "
              f"{cost.layer_forwards:,.0f} layer forwards an image")

    def _refuse(self, flags: tuple[str, ...], what: str, does: str) -> None:
        """Raises UserError for flags of another kind of run."""
        for name in flags:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise UserError(f"--{name.replace('_', '-')} is for {what}, and {self.run} {does}; leave it out")

    def _texts(self) -> list[str]:
        """The prompts. Raises UserError for a file that is none."""
        from looped.data.prompts import check_prompt, read_piped, read_prompts

        if self.prompts is not None:
            return read_prompts(self.prompts)
        return [read_piped(sys.stdin.buffer) if self.prompt == "-" else check_prompt(self.prompt)]
