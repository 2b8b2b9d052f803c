"""Logits of a trained model for other programs: of all tokens at once, or of new tokens with a cache.

There is one reader per rollout (`READERS`). A row's logits depend only on its own tokens and the seed: every row uses
the draws of a batch's first row, and each position has its own initial noise, whatever the padding or chunk size.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from looped.config import Config
from looped.diffusion.sampling_params import SamplingParams
from looped.errors import UserError
from looped.inference.loop_rollout import read_on
from looped.inference.padding import Reading
from looped.inference.rollout import rollout_of
from looped.inference.text_denoising import DenoiseWriter, TeacherForced
from looped.nn.projection import head_logits
from looped.objectives.base import Objective, rows_of_batch
from looped.objectives.leaks import check_cached
from looped.rng import StepRandom
from looped.tensor_types import Float


@dataclass(frozen=True)
class Manner:
    """A denoiser's way of writing. params: shape the distribution at every noise level; seed: of its noise, of which
    each row has its own, or None for the config's, which all rows share."""

    params: SamplingParams
    seed: int | None = None


GREEDY, PLAIN = Manner(SamplingParams(temperature=0)), Manner(SamplingParams())
LAST_ONLY: dict[str, float | None] = {
    "min_p": None, "top_h": None, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0}
"""Settings of transformers that can only shape a last readout, and their values without effect."""


class Reader:
    """The logits of an objective. Raises UserError for anything it cannot compute."""

    def __init__(self, objective: Objective, seed: int):
        self.objective = objective
        self.model: Any = objective.model
        self.seed = seed

    def draws(self, reading: Reading, seed: int | None = None) -> Callable[[int], StepRandom]:
        """Number of a step or position -> its random draws: the same for all rows, or those of a seed for each row."""
        num, device = len(reading.tokens), reading.tokens.device
        if seed is None:
            return partial(StepRandom, self.seed, count=num, rows=[0] * num, device=device)
        return partial(StepRandom, seed, count=num, device=device)

    def logits(self, reading: Reading, keep: int) -> Float[Tensor, "batch kept vocab"]:
        """Logits at the last `keep` positions, or at all of them (0)."""
        raise NotImplementedError

    def trained(self, reading: Reading) -> Float[Tensor, "batch new vocab"]:
        """Logits for training, with gradient through as many last steps as the rule says (`Objective.backprop`)."""
        raise UserError(f"a {type(self.objective).__name__} is not trained by its logits; train it with looped train, "
                        f"and export it again")

    def check_resizable(self) -> None:
        """Raises UserError if the vocabulary cannot change."""
        raise UserError(f"a {type(self.objective).__name__} noises the embeddings of its own tokens, so its vocabulary "
                        f"stays as it is; leave resize_token_embeddings out")

    def check_layers(self, family: str) -> None:
        """Raises UserError if the steps cannot be written as layers of a dense stack or a loop of another family."""
        raise UserError(f"a {type(self.objective).__name__} is not a plain loop, and {family} computes nothing else; "
                        f"export it --to hf")

    def manner_of(self, settings: Any) -> tuple[Manner, Any]:
        """The manner by the merged settings of transformers' `generate`, and the settings left to transformers."""
        return PLAIN, settings


class LoopReader(Reader):
    """Reader of a loop; its cache has keys and values of every step."""

    continues = False
    """True once the core has been tested for going on from a cache."""

    def check_resizable(self) -> None:
        pass

    def check_layers(self, family: str) -> None:
        if self.objective.damping:
            raise UserError(f"recurrence.damping {self.objective.damping:g} mixes the states around a step, and "
                            f"{family} computes plain steps; export it --to hf")

    def logits(self, reading: Reading, keep: int) -> Float[Tensor, "batch kept vocab"]:
        r = reading
        self._check_documents(r)
        if r.cache is None and self.objective.separate:
            return head_logits(self.model, self._of_documents(r)[:, -keep:])
        if r.cache is not None and r.first and not self.continues:
            check_cached(self.objective, otherwise=", or pass use_cache=False")
            self.continues = True
        state, rows = read_on(self.model, r, self.draws(r), self.objective.damping)
        return head_logits(self.model, self.model.hidden(state, rows)[:, -keep:])

    def _check_documents(self, r: Reading) -> None:
        """Raises UserError if a cache would hold several documents, whose ends it does not know."""
        if not self.objective.separate or r.cache is None:
            return
        ends = (r.tokens == self.objective.end_of_text) & (r.places() > 0)  # one may start a text or pad it
        if bool(ends.any()):
            raise UserError("this model was trained with data.documents separate, but a cache holds one document; end "
                            "the text at its end-of-text token, or read it with use_cache=False")

    def _check_unpadded(self, r: Reading) -> None:
        if r.padding.empty is not None:
            raise UserError("training, and texts of several documents, need texts without padding on the left; "
                            "pad on the right (tokenizer.padding_side = 'right')")

    def _of_documents(self, r: Reading) -> Tensor:
        """Final states, with each document read as if it stood alone."""
        self._check_unpadded(r)
        batch = self.objective.ask(torch.cat([r.tokens, r.tokens[:, -1:]], dim=1))
        rows = rows_of_batch(batch)
        e = self.model.encode(batch.inputs, rows)
        noise = None
        if self.model.recurrence.needs_noise:
            noise = r.padding.normal_by_place(self.draws(r), "state", 0, e.shape[1], e.shape[2])
        state = self.model.unroll(e, rows, grad=r.depth, noise=noise, damping=self.objective.damping)
        return self.model.hidden(state, rows)

    def trained(self, reading: Reading) -> Float[Tensor, "batch new vocab"]:
        r, model, last = reading, self.model, self.objective.backprop
        self._check_unpadded(r)
        batch = self.objective.ask(torch.cat([r.tokens, r.tokens[:, -1:]], dim=1))
        rows = rows_of_batch(batch)
        e = model.encode(batch.inputs, rows)
        noise = None
        if model.recurrence.needs_noise:
            noise = torch.randn_like(e, dtype=torch.float32)
        grad = r.depth if last is None else min(last, r.depth)
        return model.decode(model.unroll(e, rows, no_grad=r.depth - grad, grad=grad, noise=noise), rows)


class SolverReader(Reader):
    """Reader of a denoiser: the writer takes `depth` solver steps per token, from noise that is the same for every
    text."""

    def __init__(self, objective: Objective, seed: int):
        super().__init__(objective, seed)
        if objective.config.block_size > 1:
            raise UserError(f"this denoiser predicts {objective.config.block_size} tokens at a time "
                            f"(denoise.block_size), but transformers expects one; sample it with looped generate")

    def logits(self, reading: Reading, keep: int) -> Float[Tensor, "batch kept vocab"]:
        """Teacher-forced logits at sigma_max, whatever the depth: the distribution of each token, given the true
        earlier ones. Those of later solver steps are of a token that their noisy input has already drawn."""
        r = reading
        if r.padding.empty is not None:
            raise UserError("a denoiser's logits need texts without padding on the left; give texts of one length, "
                            "or one at a time")
        rows = torch.cat([r.tokens, r.tokens[:, -1:]], dim=1)  # no row attends to the last one
        return TeacherForced(self.objective, rows).first_logits(self.draws(r)(0), "")[:, -keep:]

    def manner_of(self, settings: Any) -> tuple[Manner, Any]:
        """Greedy search takes the most likely token at every noise level, as `looped generate` does. Sampling applies
        temperature, top-k and top-p there (after the last step the token is fixed), to noise whose seed is drawn from
        torch's own generator."""
        if settings.use_cache is False:
            raise UserError("a denoiser generates with its cache, which holds the noise of earlier tokens; leave "
                            "use_cache=False out")
        if not settings.do_sample:
            return GREEDY, settings
        for name, idle in LAST_ONLY.items():
            if getattr(settings, name, None) not in (None, idle):
                raise UserError(f"a denoiser fixes a token before the last readout, which is all that {name} would "
                                f"change; leave it out, or give temperature, top_k or top_p")
        params = SamplingParams(settings.temperature, settings.top_k or None, settings.top_p)
        own = copy(settings)
        own.temperature, own.top_k, own.top_p = 1.0, 0, 1.0
        return Manner(params, int(torch.randint(2**62, ()))), own

    def writer(self, reading: Reading, steering: SamplingParams) -> DenoiseWriter:
        """A writer that starts from the beginning of the prompts."""
        return DenoiseWriter(self.objective, reading.depth, steering, reading.padding)


READERS: dict[str, type[Reader]] = {"loop": LoopReader, "solver": SolverReader}
"""Name of a rollout -> class of its reader."""


def reader_of(objective: Objective, config: Config) -> Reader:
    """The reader of an objective. Raises UserError for a model that does not generate text token by token."""
    name = rollout_of(objective).name
    if not config.kind.writes or name not in READERS:
        raise UserError(f"a {type(objective).__name__} on {config.kind.noun} predicts no next token, but transformers "
                        f"needs models that do: loops and denoisers of text")
    return READERS[name](objective, config.seed)
