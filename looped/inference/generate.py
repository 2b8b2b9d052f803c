"""Text generation at any depth, from prompts of any length, each continued as it would be alone.

Prompts of unequal length are padded on the left. Positions, masks and random draws are per prompt, so a text does not
depend on its batch.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from looped.diffusion.sampling_params import SamplingParams
from looped.errors import UserError
from looped.inference.autoregressive import Writing
from looped.inference.padding import Padding
from looped.inference.rollout import rollout_of
from looped.inference.sequence_batch import Ending
from looped.nn.checks import kind_of
from looped.objectives.base import Objective, evaluating, require_text
from looped.rng import StepRandom
from looped.tensor_types import Int


@torch.no_grad()
def generate(objective: Objective, prompt: Int[Tensor, "batch length"], *, num_tokens: int, depth: int,
             temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0, seed: int = 0,
             lengths: Int[Tensor, "batch"] | None = None, side: str = "right", first_row: int = 0,
             stop: Sequence[str] = (), decode: Callable[[Sequence[int]], str] | None = None,
             past_the_end: bool = False, rows: Sequence[int] | None = None) -> Int[Tensor, "batch {num_tokens}"]:
    """Continue each prompt by at most `num_tokens` tokens, with `depth` loop or solver steps per token (or per block of
    tokens). Masked diffusion reveals all tokens in `depth` steps.

    A text ends at the objective's `end_of_text` (not with `past_the_end`), or at the token that completes one of the
    `stop` strings in the decoded text (`decode`); the rest of its row is `NOTHING` (-1), which the tokenizer's `decode`
    drops.

    `temperature`, `top_k` and `top_p` shape the distribution that tokens are drawn from (`SamplingParams`): for a
    denoiser at every noise level, for masked diffusion at every step. `lengths`: real tokens of each prompt, padded on
    `side`. Row i uses the random draws of row `first_row + i`, or of `rows[i]`, so parts of a batch give the same texts
    as the whole. If the objective keeps documents `separate`, the model sees only the last document of a prompt. Raises
    `UserError` for a prompt without tokens, for sampling parameters out of range, and for `past_the_end` if documents
    are kept separate.
    """
    _check_request(objective, prompt, num_tokens, depth)
    padding = Padding(lengths, prompt.shape[1], prompt.device)
    if padding.shortest == 0:
        raise UserError("the prompt has no tokens; give it at least one")
    steering = SamplingParams(temperature, top_k, top_p)
    if past_the_end and objective.separate:
        raise UserError("past_the_end continues with another document, but this model keeps documents separate and was "
                        "never trained to continue past an end of text; leave it out")
    ending = Ending(None if past_the_end else objective.end_of_text, stop, decode)
    prompt = padding.on_the_left(prompt, side)
    if objective.separate:
        padding = _last_document(objective, prompt, padding)
    draws = partial(StepRandom, seed, start=first_row, count=len(prompt), device=prompt.device, rows=rows)
    with evaluating(objective):
        way = Writing(steering, padding, draws, ending)
        return ending.cut(rollout_of(objective).write(prompt, num_tokens, depth, way))


def _check_request(objective: Objective, prompt: Tensor, num_tokens: int, depth: int) -> None:
    """Raises UserError for an objective that is not over text, and an invalid prompt, number of tokens or depth."""
    require_text(objective, "continuations")
    if not isinstance(prompt, Tensor) or prompt.ndim != 2 or prompt.dtype != torch.long:
        raise UserError(f"a prompt is a tensor of token ids, int64 (batch, length), got {kind_of(prompt)}; of a text "
                        f"make torch.tensor([run.tokenizer.encode(text)])")
    for name, value in (("depth", depth), ("num_tokens", num_tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{name} {value!r} is not a whole number of 1 or more; give one")
    known = objective.model.vocab_size
    low, high = torch.stack(prompt.aminmax()).tolist() if prompt.numel() else (0, 0)
    if not 0 <= low <= high < known:
        raise UserError(f"the prompt holds token {high if low >= 0 else low}, and the vocabulary is 0 to {known - 1}; "
                        f"encode it with the tokenizer of the run")


def _last_document(objective: Objective, prompt: Tensor, padding: Padding) -> Padding:
    """Padding that hides everything before the last document of each prompt (padded on the left). The end-of-text token
    before it stays visible to predict its first token; masked diffusion does not see it, as in training."""
    width, hidden = prompt.shape[1], rollout_of(objective).hidden_first
    own = torch.arange(width, device=prompt.device) >= (0 if padding.empty is None else padding.empty.unsqueeze(1))
    last = torch.where((prompt == objective.end_of_text) & own,
                       torch.arange(width, device=prompt.device) + hidden, 0).amax(1)
    empty = last if padding.empty is None else torch.maximum(last, padding.empty)
    return Padding(width - empty, width)
