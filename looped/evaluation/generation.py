"""Text from a model at any depth, with one cache a loop step or noise level.

A denoiser's earlier tokens are shown to the solver as in training. `inject`: once a token is chosen, its row is noised
anew to the level of each solver step, and one forward pass of two rows does both: the token just chosen, the one
sought. `concat` and `context` keep one clean cache, whatever the depth, and solve for a block of tokens at once.

Masked diffusion writes no token after another: all that is sought is hidden at first, and shown step by step.

Prompts of several lengths are padded on the left. Positions, masks and draws are those of each row alone, so a text
does not depend on the batch that it is written in.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from looped.diffusion.bridge import draw
from looped.diffusion.denoiser import Walk, levels_of
from looped.diffusion.masking import unmask
from looped.diffusion.solve import solve
from looped.diffusion.steering import Steering
from looped.errors import UserError
from looped.evaluation.masked_bound import step_levels
from looped.evaluation.texts import NOTHING, Ending
from looped.nn.bias import Full, Mask, Padded
from looped.nn.cache import Cache
from looped.nn.precision import widest
from looped.nn.rows import Rows
from looped.objectives.base import EVERYBODY, Objective, evaluating
from looped.objectives.bptt import Unrolled
from looped.objectives.denoise import Denoise
from looped.objectives.masked import Masked
from looped.rng import StepRandom


@torch.no_grad()
def generate(objective: Objective, prompt: Int[Tensor, "batch length"], *, num_tokens: int, depth: int,
             temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0, seed: int = 0,
             lengths: Int[Tensor, "batch"] | None = None, side: str = "right", first_row: int = 0,
             stop: Sequence[str] = (), decode: Callable[[Sequence[int]], str] | None = None,
             past_the_end: bool = False) -> Int[Tensor, "batch {num_tokens}"]:
    """Continue each prompt by at most `num_tokens` tokens with `depth` loop or solver steps a token, or a block of
    them; of masked diffusion, with `depth` steps in which all of them are shown.

    A text ends with the objective's `end_of_text`, unless it is to go on `past_the_end`, or with the token that
    completes one of the `stop` strings, which are looked for in its `decode`; the rest of its row is `NOTHING` (-1).

    `temperature`, `top_k` and `top_p` steer the distribution that tokens are drawn from (`Steering`), for a denoiser at
    every noise level, for masked diffusion at every step. `lengths`: real tokens of each prompt, padded on `side`. Row
    i draws as row `first_row + i`, so parts of a batch give what the whole gives. Of an objective whose documents are
    kept `separate` the model sees of a prompt its last document alone. Raises `UserError` for a prompt without tokens,
    for numbers or steering out of range, and for going on past the end where documents are kept separate.
    """
    _check_request(objective, prompt, num_tokens, depth)
    padding = Padding(None if lengths is None else lengths.to(prompt.device), prompt.shape[1])
    if padding.shortest == 0:
        raise UserError("the prompt has no tokens; give it at least one")
    steering = Steering(temperature, top_k, top_p)
    if past_the_end and objective.separate:
        raise UserError("past_the_end goes on with another document, and this model keeps documents separate and has "
                        "never read one after another; leave it out")
    ending = Ending(None if past_the_end else objective.end_of_text, stop, decode)
    prompt = padding.on_the_left(prompt, side)
    if objective.separate:
        padding = _last_document(objective, prompt, padding)
    write = _unmasked if isinstance(objective, Masked) else _one_after_another
    draws = partial(StepRandom, seed, start=first_row, count=len(prompt), device=prompt.device)
    with evaluating(objective):
        return ending.cut(write(objective, prompt, num_tokens, depth, steering, padding, draws, ending))


def _check_request(objective: Objective, prompt: Tensor, num_tokens: int, depth: int) -> None:
    """Raises UserError for what cannot be continued, or not by so much."""
    if prompt.ndim != 2 or prompt.dtype != torch.long:
        raise UserError(f"a prompt is a tensor of token ids, int64 (batch, length); got {prompt.dtype} of shape "
                        f"{tuple(prompt.shape)}")
    for name, value in (("depth", depth), ("num_tokens", num_tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{name} {value!r} is not a whole number of 1 or more; give one")
    known = objective.model.vocab_size
    if prompt.numel() and not 0 <= int(prompt.min()) <= int(prompt.max()) < known:
        raise UserError(f"the prompt holds token {int(prompt.max() if prompt.min() >= 0 else prompt.min())}, and the "
                        f"model knows 0 to {known - 1}; encode it with the tokenizer of the run")


def _last_document(objective: Objective, prompt: Tensor, padding: "Padding") -> "Padding":
    """Padding that hides what stands before the last document of each prompt, padded on the left. Its first token is
    predicted from the end of text before it, which masked diffusion, as in training, does not see."""
    width, hidden = prompt.shape[1], int(isinstance(objective, Masked))
    own = torch.arange(width, device=prompt.device) >= (0 if padding.empty is None else
                                                        padding.empty.to(prompt.device).unsqueeze(1))
    last = torch.where((prompt == objective.end_of_text) & own,
                       torch.arange(width, device=prompt.device) + hidden, 0).amax(1)
    empty = last if padding.empty is None else torch.maximum(last, padding.empty.to(prompt.device))
    return Padding(width - empty, width)


def _one_after_another(objective: Objective, prompt: Tensor, num_tokens: int, depth: int, steering: Steering,
                       padding: "Padding", draws: Callable[[int], StepRandom],
                       ending: Ending) -> Int[Tensor, "batch _"]:
    """Each token, or block of them, from what stands before it, until all texts are over; then `NOTHING`."""
    writer = (DenoiseWriter if isinstance(objective, Denoise) else LoopWriter)(objective, depth, steering, padding)
    new, texts, step = prompt, prompt[:, :0], 0
    over = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    while texts.shape[1] < num_tokens and not bool(over.all()):
        random = draws(step)
        probs = torch.softmax(writer.next_logits(new, random).to(widest(prompt.device)), dim=-1)  # B k V
        new, step = draw(probs, random.uniform("token", probs.shape[1:2])), step + 1
        texts = torch.cat([texts, new], dim=1)
        over |= ending.over(texts[:, -ending.reach(new.shape[1]) :])
    texts = texts[:, :num_tokens]
    return torch.nn.functional.pad(texts, (0, num_tokens - texts.shape[1]), value=NOTHING)


def _unmasked(objective: Masked, prompt: Tensor, num_tokens: int, depth: int, steering: Steering,
              padding: "Padding", draws: Callable[[int], StepRandom],
              ending: Ending) -> Int[Tensor, "batch {num_tokens}"]:
    """All tokens together. In training about a share m of a text is hidden at level m, so a text whose prompt stays in
    sight is at the level of its hidden share, which also says whose block it is."""
    random, first, width = draws(0), prompt.shape[1], prompt.shape[1] + num_tokens
    tokens = torch.nn.functional.pad(prompt, (0, num_tokens), value=objective.model.mask_token)
    sought = (torch.arange(width, device=prompt.device) >= first).expand_as(tokens)
    whole = torch.full((len(prompt),), width, dtype=torch.float64)
    share = num_tokens / (whole if padding.empty is None else whole - padding.empty.cpu())  # without the empty columns
    rows = Rows(mask=padding.mask(width, causal=False) or EVERYBODY, start=padding.start(0))

    def uniform(stream: str, step: int) -> Tensor:
        own = random.uniform(f"{stream}{step}", (num_tokens,))
        return torch.nn.functional.pad(own, (first, 0))  # a row's draws do not depend on what stands before it

    return unmask(lambda tokens, m: steering(objective.logits(tokens, m * share, rows)), tokens, sought,
                  step_levels(objective, depth), uniform=uniform)[:, first:]


class Padding:
    """Empty columns on the left of the shorter rows of a batch: where each row's own columns are."""

    def __init__(self, lengths: Int[Tensor, "batch"] | None, width: int):
        self.lengths = None if lengths is None or bool((lengths == width).all()) else lengths
        if lengths is not None and not 0 <= int(lengths.min()) <= int(lengths.max()) <= width:
            raise UserError(f"prompt lengths {lengths.tolist()} do not lie between 0 and the padded length {width}; "
                            f"give the number of real tokens of each row")
        self.shortest = width if lengths is None else int(lengths.min())
        self.empty = None if self.lengths is None else width - self.lengths

    def on_the_left(self, tokens: Int[Tensor, "batch length"], side: str) -> Int[Tensor, "batch length"]:
        """The tokens with the padding of `side` moved to the left."""
        if side not in ("left", "right"):
            raise UserError(f"padding side '{side}' is unknown; use 'right' or 'left'")
        if self.empty is None or side == "left":
            return tokens
        columns = torch.arange(tokens.shape[1], device=tokens.device) - self.empty.unsqueeze(1)
        return tokens.gather(1, columns % tokens.shape[1])

    def start(self, column: int) -> int | Int[Tensor, "batch"]:
        """The position at which a column stands in each row."""
        return column if self.empty is None else column - self.empty

    def mask(self, width: int, *, causal: bool = True) -> Mask | None:
        """Who sees whom among the first `width` columns; None where nothing is empty."""
        return None if self.empty is None else Padded(width - self.empty, side="left", causal=causal, width=width)

    def normal(self, random: StepRandom, stream: str, first: int, stop: int, dim: int) -> Tensor:
        """Draws for the columns first ... stop - 1: each row's as if it had no empty columns, which get zeros."""
        if self.empty is None or first > 0:
            return random.normal(stream, (stop - first, dim))
        rows = [torch.randn(stop - empty, dim, generator=gen)
                for empty, gen in zip(self.empty.tolist(), random.per_row(stream), strict=True)]
        padded = [torch.nn.functional.pad(row, (0, 0, stop - len(row), 0)) for row in rows]
        return torch.stack(padded).to(random.device)


class LoopWriter:
    """Next-token logits of an unrolled loop; keys and values of each loop step are kept."""

    def __init__(self, objective: Unrolled, depth: int, steering: Steering, padding: Padding):
        self.model, self.depth, self.steering, self.padding = objective.model, depth, steering, padding
        self.cache, self.width = Cache(), 0

    def next_logits(self, new: Int[Tensor, "batch new"], random: StepRandom) -> Tensor:
        """Logits (B, 1, V) after the columns so far and the `new` ones."""
        first, self.width = self.width, self.width + new.shape[1]
        rows = Rows(start=self.padding.start(first), mask=self.padding.mask(self.width), cache=self.cache)
        e = self.model.encode(new, rows)
        noise = None
        if self.model.recurrence.needs_noise:
            noise = self.padding.normal(random, "state", first, self.width, e.shape[-1])
        state = self.model.unroll(e, rows, grad=self.depth, noise=noise)
        return self.steering(self.model.decode(state, rows)[:, -1:])


class DenoiseWriter:
    """Logits of the next block at the last step of a solver; one cache a noise level, or one clean context for all."""

    def __init__(self, objective: Denoise, depth: int, steering: Steering, padding: Padding):
        self.steering, self.padding = steering, padding
        self.objective, self.denoiser, self.model = objective, objective.denoiser, objective.model
        self.block = objective.config.block_size
        self.depth = depth
        self.cache, self.width = Cache(), 0
        self.context: Cache | None = None
        self.last_e: Tensor | None = None

    def next_logits(self, new: Int[Tensor, "batch new"], random: StepRandom) -> Tensor:
        """Logits (B, k, V) of the block after the columns so far and the `new` ones."""
        first, self.width = self.width, self.width + new.shape[1]
        rows = Rows(start=self.padding.start(first), mask=self.padding.mask(self.width))
        e = self.model.encode(new, rows.having(cache=self.cache))
        self.context = self.model.make_context(e, self.objective.config.context, rows.having(context=self.context))
        logits_at = self._beside_context(e) if self.context is not None else self._beside_noisy_rows(e, new, random)
        return self._solve(logits_at, random)

    def _beside_context(self, e: Tensor):
        """(z, level) -> logits of the sought block, which sees the clean context and itself."""
        whole = Full() if self.block > 1 else None
        mask = self.padding.mask(self.width + self.block, causal=False) or whole
        rows = Rows(mask=mask, start=self.padding.start(self.width - 1), context=self.context)
        walk = Walk(self.denoiser)

        def logits_at(z: Tensor, level: float | Tensor) -> Tensor:
            return walk(z, levels_of(z, level), e[:, -1:], rows, steer=self.steering)

        return logits_at

    def _beside_noisy_rows(self, e: Tensor, new: Tensor, random: StepRandom):
        """(z, level) -> logits of the sought row. Rows whose tokens are known by now, all of `new` and for a prompt all
        but its first, are noised to each level the first time that it is read, and stay in its cache."""
        known = new[:, 1:] if self.last_e is None else new
        held_e = e if self.last_e is None else torch.cat([self.last_e, e], dim=1)
        self.last_e = e[:, -1:]
        first = self.width - held_e.shape[1]
        target = self.denoiser.target(known)
        eps = self.padding.normal(random, "teacher", first, self.width - 1, target.shape[-1])
        mask, seen = self.padding.mask(self.width), set()

        def logits_at(z: Tensor, level: float) -> Tensor:
            noisy, noisy_e, column = z, held_e[:, -1:], self.width - 1
            if level not in seen:  # a solver may come back to a level: commit once
                noisy, noisy_e, column = torch.cat([target + level * eps, z], dim=1), held_e, first
            seen.add(level)
            cache = self.cache.child("level", level)
            rows = Rows(mask=mask, start=self.padding.start(column), cache=cache)
            logits = self.denoiser(noisy, levels_of(z, level), noisy_e, rows, steer=self.steering)
            cache.truncate(self.width - 1)  # the sought row is not known yet
            return logits[:, -1:]

        return logits_at

    def _solve(self, logits_at, random: StepRandom) -> Tensor:
        """The last logits of a solve from pure noise."""
        logits, calls = None, itertools.count()  # each call of a sampled bridge draws anew
        shape = self.block, self.denoiser.targets.dim

        def denoise(z: Tensor, sigma) -> Tensor:
            nonlocal logits
            logits = logits_at(z.float(), sigma)
            return self.denoiser.estimate(logits, random.uniform(f"bridge{next(calls)}", logits.shape[1:2]))

        solve(self.objective.config, self.objective.noise, denoise, self.depth,
              normal=lambda stream: random.normal(stream, shape))
        return logits
