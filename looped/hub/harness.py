"""A run at one depth as a model for lm-evaluation-harness.

    lm_eval.simple_evaluate(model=RunLM(load_run("runs/mine"), depth=8), tasks=["hellaswag"])

Tokens, boundaries and truncation are those of lm_eval's own model for transformers (0.4.13, models/huggingface.py): a
context and its answer are encoded as one text, and a text that is too long is truncated from the left. Scores come from
`looped.evaluation.continuation_logprobs`, texts from `looped.inference.generate`. No result depends on the batch.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from looped.data.tokenizer import TextTokenizer
from looped.errors import UserError
from looped.evaluation.continuation_logprobs import Continuations
from looped.hub.importing import max_length_of
from looped.inference.generate import generate
from looped.inference.sequence_batch import Ending, as_lists
from looped.rng import number_of
from looped.training.runs import Run

if TYPE_CHECKING:  # lm_eval has no py.typed, so type checkers do not know its classes
    class TemplateLM:
        """Stand-in for type checkers."""

        loglikelihood: Any
else:
    from lm_eval.api.model import TemplateLM

KNOWN = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")
"""The generation settings that are supported here."""


@dataclass(frozen=True)
class Manner:
    """The generation settings of a task."""

    num_tokens: int
    until: tuple[str, ...]
    temperature: float
    top_k: int | None
    top_p: float


class RunLM(TemplateLM):
    """A run at a depth. max_length: the context length in tokens, `max_length_of(run)` if None. continuations: scores
    shared by models of several depths, so that a loop is unrolled once for all of them.

    Raises UserError for a run without scores per token.
    """

    def __init__(self, run: Run, depth: int, *, max_length: int | None = None, batch_size: int | None = None,
                 continuations: Continuations | None = None):
        super().__init__()
        self.run = run
        self.depth = depth
        self.max_length: int = max_length or max_length_of(run)
        self.batch_size: int = batch_size or run.config.evaluation.batch_size
        self.words: TextTokenizer = run.tokenizer
        self.continuations: Continuations = continuations or Continuations(
            run.objective, [depth], seed=run.config.seed, batch_size=self.batch_size)
        self.num_cut: int = 0
        self._device = run.device

    @property
    def eot_token_id(self) -> int:
        return self.words.end_of_text

    @property
    def prefix_token_id(self) -> int:
        """The token before a text: the tokenizer's start token, else its end-of-text token."""
        return next(iter(self.words.encode("", framed=True)), self.words.end_of_text)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.words.encode(string, framed=add_special_tokens is not False)

    # ---- scores

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]],
                              **kwargs) -> list[tuple[float, bool]]:
        asked = [(self._cut(context, answer), len(answer)) for _, context, answer in requests]
        return [(-scored.nats, scored.likeliest) for scored in self.continuations.at(self.depth, asked)]

    def _cut(self, context: list[int], answer: list[int]) -> tuple[int, ...]:
        """An answer with as much of its context as fits; the last token is a target only, so it needs no room."""
        if not 0 < len(answer) <= self.max_length:
            raise UserError(f"a task has an answer of {len(answer)} tokens, but this run scores 1 to "
                            f"{self.max_length}; give another --max-length")
        whole = (*context, *answer)
        self.num_cut += len(whole) > self.max_length + 1
        return whole[-(self.max_length + 1):]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of each document, read in windows that score each token once."""
        return [self._rolling(*request.args) for request in requests]

    def _rolling(self, text: str) -> float:
        windows = get_rolling_token_windows(self.tok_encode(text), prefix_token=self.prefix_token_id,
                                            max_seq_len=self.max_length, context_len=1)
        parts = [(None, *make_disjoint_window(window)) for window in windows]
        return sum(score for score, _ in self._loglikelihood_tokens(parts))

    # ---- generated answers

    def manner(self, settings: dict[str, Any]) -> tuple[Manner, int]:
        """(generation settings that a task asks for, number of tokens left for the context). Raises UserError."""
        settings = {**normalize_gen_kwargs(settings)}
        until = settings["until"] if isinstance(settings.get("until"), list) else [settings.get("until")]
        sampled = settings["do_sample"]
        steering = (settings.get("temperature", 1.0), settings.get("top_k") or None, settings.get("top_p", 1.0))
        manner = Manner(settings["max_gen_toks"], tuple(stop for stop in until if stop),
                        *(steering if sampled else (0.0, None, 1.0)))
        unknown = sorted(name for name in settings.keys() - set(KNOWN) if settings[name] not in (None, 1, False))
        if unknown:
            warnings.warn(f"a task asks for {', '.join(unknown)}, which is not supported here; its answers are "
                          f"generated without", stacklevel=2)
        room = self.max_length - manner.num_tokens
        if room < 1:
            raise UserError(f"a task has answers of up to {manner.num_tokens} tokens, but this run reads "
                            f"{self.max_length}, which leaves no room for a question; give a --max-length above "
                            f"{manner.num_tokens}")
        return manner, room

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        alike: dict[tuple[Manner, int], list[tuple[int, list[int]]]] = {}
        for place, (context, settings) in enumerate(request.args for request in requests):
            (manner, room), tokens = self.manner(settings), self.tok_encode(context) or [self.prefix_token_id]
            self.num_cut += len(tokens) > room
            alike.setdefault((manner, room), []).append((place, tokens[-room:]))
        found, seen = {}, Counter()
        for (manner, _), prompts in alike.items():
            numbered = []
            for place, tokens in prompts:  # a repeated question gets its own draws
                numbered.append((place, tokens, number_of(seen[tuple(tokens)], *tokens)))
                seen[tuple(tokens)] += 1
            numbered.sort(key=lambda each: (len(each[1]), each[0]))
            for start in range(0, len(numbered), self.batch_size):
                places, rows, numbers = zip(*numbered[start : start + self.batch_size], strict=True)
                found |= zip(places, self._write(rows, numbers, manner), strict=True)
        return [found[place] for place in range(len(requests))]

    def _write(self, rows: Sequence[list[int]], numbers: Sequence[int], manner: Manner) -> list[str]:
        """The continuation of each prompt, up to its first stop string."""
        decode = self.words.decode
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        texts = generate(self.run.objective, padded.to(self._device), num_tokens=manner.num_tokens, depth=self.depth,
                         lengths=torch.tensor([len(row) for row in rows]), temperature=manner.temperature,
                         top_k=manner.top_k, top_p=manner.top_p, seed=self.run.config.seed, stop=manner.until,
                         decode=decode, rows=numbers if manner.temperature else [0] * len(rows))
        ending = Ending(stop=manner.until, decode=decode)
        return [ending.without_stop(decode(text)) for text in as_lists(texts)]


def models_of(run: Run, depths: Sequence[int], *, max_length: int | None = None) -> list[RunLM]:
    """One model per depth; they share their scores."""
    shared = Continuations(run.objective, depths, seed=run.config.seed, batch_size=run.config.evaluation.batch_size)
    return [RunLM(run, depth, max_length=max_length, continuations=shared) for depth in depths]
