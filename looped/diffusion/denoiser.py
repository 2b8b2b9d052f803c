"""A looped model as a denoiser: EDM's preconditioning around `step` and `decode` (Karras et al. 2022; DiffusionBlocks).

The network takes `c_in z` and `c_noise` and returns logits over tokens; the *bridge* turns logits back into the clean
estimate D that solvers step along. Cross-entropy replaces EDM's regression, so c_skip and c_out are not used.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from looped.config.denoise import DenoiseConfig
from looped.devices import to_device
from looped.diffusion.clean_estimate import bridge
from looped.diffusion.edm import EDM, align
from looped.diffusion.noise import block_of
from looped.diffusion.targets import TargetEmbedding
from looped.errors import UserError
from looped.nn.cache import Cache
from looped.nn.checks import require
from looped.nn.fused import compute_dtype
from looped.nn.masks import CleanNoisyBlocks
from looped.nn.projection import cast_for, head_logits, table_of
from looped.nn.rows import PLAIN, Rows
from looped.tensor_types import Bool, Float, Float64, Int, Int64

Noisy = Float[Tensor, "batch length dim"]
Sigma = Float[Tensor, "batch"] | Float[Tensor, "batch length"]
Steer = Callable[[Tensor], Tensor]
"""Logits -> logits."""


class Level(NamedTuple):
    """Noise levels as the network takes them: `sigma`, and in float32 on the device of z EDM's `c_in` and `c_noise` and
    the `precision` 1 / sigma^2 of the evidence."""

    sigma: Sigma
    c_in: Sigma
    c_noise: Sigma
    precision: Sigma


@runtime_checkable
class LoopedModel(Protocol):
    """The members that denoising needs of a model, in training (`Denoise`), generation and `evaluate_depth`.

    width: D of all hidden states (B, L, D). vocab_size: V. embed: the input embedding, (V, D). `encode` gives e, the
    encoded input; `step` one application of the core, with `level` (B,) or (B, L) the noise level as EDM's c_noise;
    `hidden` the input (B, L, D) of the head, `head_weight` (V, D) the head, `decode` the logits (B, L, V).
    `make_context` gives the keys and values that `denoise.context context` and `concat` attend to, and None under
    `inject`. `rows` (`looped.nn.rows.Rows`) carries the attention mask and the positions; a model may ignore what it
    does not use. The three layer counts serve only to count layer forwards: `core_layers` has one number per block,
    the layers of a network evaluation, and `block_layers`, which a model may have, those of one run of the block.
    `embed_scale`, which it may have too, is the factor of the input embedding in `encode`, 1 without it.
    """

    width: int
    vocab_size: int
    embed: nn.Embedding
    num_prelude_layers: int
    core_layers: Sequence[int]
    num_coda_layers: int

    def encode(self, tokens: Tensor, rows: Rows) -> Tensor: ...

    def make_context(self, e: Tensor, kind: str, rows: Rows) -> Cache | None: ...

    def step(self, state: Tensor, e: Tensor, level: Tensor | None, rows: Rows) -> Tensor: ...

    def decode(self, state: Tensor, rows: Rows) -> Tensor: ...

    def hidden(self, state: Tensor, rows: Rows) -> Tensor: ...

    @property
    def head_weight(self) -> Tensor: ...


MEMBERS = (*LoopedModel.__annotations__, *(name for name in vars(LoopedModel) if not name.startswith("_")))
ALONE = ("width", "vocab_size", "embed", "step", "decode")
"""The members of `LoopedModel` that a `Denoiser` needs without a training rule."""


def require_members(model: object, names: Iterable[str], asker: str) -> None:
    """Raise `UserError` naming the members of `LoopedModel` among `names` that the model lacks."""
    # On the class or the instance: reading a property such as head_weight may raise.
    if missing := [name for name in names if not (hasattr(type(model), name) or hasattr(model, name))]:
        raise UserError(f"{type(model).__name__} has no {' and no '.join(missing)}, which {asker} needs; see "
                        f"looped.LoopedModel for all members of a model")


class Denoiser(nn.Module):
    """`(z, sigma, e) -> logits`, and through the bridge `-> D`, for any model with `step` and `decode`.

    `edges`: descending noise levels; block b of the model's core covers the levels between edges b and b + 1. None: one
    block covers all levels. `owners` maps levels to blocks, in training, evaluation and sampling.
    """

    def __init__(self, model: LoopedModel, config: DenoiseConfig | None = None, *,
                 edges: Float64[Tensor, "edges"] | None = None):
        super().__init__()
        config = DenoiseConfig() if config is None else config
        require_members(model, ALONE, "a denoiser")
        require(config, DenoiseConfig, "config", "pass DenoiseConfig(context='inject'), or nothing for its defaults")
        self.model = model
        self.config = config
        self.edges = edges  # not a buffer: casting the module to half precision would round it
        self.targets: TargetEmbedding = TargetEmbedding(model.vocab_size, config.target, model.width)
        self.edm: EDM = EDM(self.targets.sigma_data)
        self.in_proj: nn.Linear = start_projection(self.targets.dim, model.width)
        # Embedding of a row's place in its block; the rows of a block share the e of its first row.
        self.place: nn.Parameter | None = (
            nn.Parameter(torch.zeros(config.block_size, model.width)) if config.block_size > 1 else None)
        # Null embedding: replaces e in every row when the image is dropped.
        self.nothing: nn.Parameter | None = nn.Parameter(torch.zeros(model.width)) if config.context_dropout else None
        self.carry_proj: nn.Linear | None = self._carry_projection()
        self.log_logit_scale: nn.Parameter = nn.Parameter(
            torch.zeros(()), requires_grad=config.target.learned_logit_scale)

    def _carry_projection(self) -> nn.Linear | None:
        """Projection of the carry into the next step's state; zero-initialised, so the carry has no effect at first."""
        if self.config.carry == "none":
            return None
        size = self.targets.dim if self.config.carry == "estimate" else self.model.width
        projection = nn.Linear(size, self.model.width, bias=False)
        nn.init.zeros_(projection.weight)
        return projection

    def table(self) -> Float[Tensor, "vocab dim"]:
        """The clean rows of all tokens."""
        return self.targets.table(self._embeddings())

    def target(self, tokens: Int[Tensor, "batch length"]) -> Noisy:
        """The clean rows y of `tokens`."""
        return self.targets(tokens, self._embeddings())

    @property
    def clean_layers(self) -> Sequence[int]:
        """Layers that clean rows run in each block of the core (`denoise.context concat`): once, however often a
        network evaluation runs it."""
        return getattr(self.model, "block_layers", self.model.core_layers)

    def _embeddings(self) -> Float[Tensor, "vocab width"]:
        return table_of(self.model.embed, self.model.vocab_size)

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        """The factor on the logits (an inverse temperature)."""
        return self.log_logit_scale.exp()

    def forward(self, z: Noisy, sigma: Sigma | float, e: Tensor, rows: Rows = PLAIN, *, carry: Tensor | None = None,
                steer: Steer | None = None) -> Float[Tensor, "batch length vocab"]:
        """Logits of the clean tokens behind `z = y + sigma * eps`.

        Row i knows the clean tokens up to i through `e`; with `block_size` k > 1 it knows those up to the first row of
        its block, and the rows of a block attend to each other.

        sigma: above 0; one level for all (a number), per sequence (B,) or per row (B, L). The cache in `rows` belongs
        to one solver step; `carry` is the previous step's output (`Trajectory`). `steer` changes the network's logits
        before the known part of the posterior is added (`SamplingParams`). If the core has several blocks, each
        sequence runs through the one that owns its level. Raises `UserError` for a level that is not above 0.
        """
        return self.read(z, _checked_levels(z, sigma), e, rows, carry=carry, steer=steer)[0]

    def without(self, e: Float[Tensor, "batch length width"],
                dropped: Bool[Tensor, "batch"] | None = None) -> Float[Tensor, "batch length width"]:
        """e with the null embedding for the `dropped` images (None: all)."""
        nothing = self.nothing.to(e.dtype).expand_as(e)
        return nothing if dropped is None else torch.where(to_device(dropped.view(-1, 1, 1), e.device), nothing, e)

    def guided(self, logits: Tensor, z: Noisy, sigma: Sigma, e: Tensor, rows: Rows = PLAIN, **options: Any) -> Tensor:
        """Classifier-free guidance: u + w (logits - u), with u the logits without the image and w = `denoise.guidance`.

        Ho & Salimans 2022 (arXiv 2207.12598), equation 6 with w - 1 for its w, applied to logits: the known part of the
        posterior counts once.
        """
        if self.config.guidance == 1:
            return logits
        return torch.lerp(self.read(z, sigma, self.without(e), rows, **options)[0], logits, self.config.guidance)

    def owners(self, sigma: Sigma) -> Int64[Tensor, "*shape"]:
        """The block of the core that owns each level."""
        return block_of(sigma, self.edges)

    def at(self, z: Noisy, sigma: Sigma) -> Level:
        """The levels with what the network needs of them, in one copy to the device of z."""
        parts = self.edm.c_in(sigma), self.edm.c_noise(sigma), _precision(sigma)
        return Level(sigma, *to_device(torch.stack(parts), z.device).unbind())

    def read(self, z: Noisy, sigma: Sigma, e: Tensor, rows: Rows = PLAIN, *, carry: Tensor | None = None,
             steer: Steer | None = None, level: Level | None = None) -> tuple[Tensor, Tensor | None]:
        """(logits, the carry to the next step). level: `at(z, sigma)`, if it is there already.

        If `rows.block` names one of several blocks, that block runs whether or not it owns the levels: training does
        so, since blocks also learn some of their neighbours' levels.
        """
        if self.edges is not None and rows.block is None:
            return self._read_by_owners(z, sigma, e, rows, carry=carry, steer=steer, level=level)
        level = self.at(z, sigma) if level is None else level
        rows = self._of_block(z, rows)
        state = self._state(z, level, e, rows, carry)
        logits = self.model.decode(state, rows).float() * self.logit_scale
        logits = logits if steer is None else steer(logits)
        logits = logits + self._log_likelihood(z, level) if self.config.posterior else logits
        D = bridge("soft", logits, self.table()) if self.config.carry == "estimate" else None
        return logits, self.handed_on(state, D)

    def _read_by_owners(self, z: Noisy, sigma: Sigma, e: Tensor, rows: Rows,
                        **options: Any) -> tuple[Tensor, Tensor | None]:
        """`read` with each sequence through the block that owns its level.

        Masks and contexts belong to the whole batch, so each of several owners runs on all of it, and only the results
        for its own sequences are kept. With several owners, raises UserError for a cache, which holds the rows of one
        block, and for levels per row.
        """
        owners = self.owners(sigma)
        blocks = owners.unique().tolist()
        if len(blocks) > 1 and (rows.cache is not None or owners.ndim > 1):
            one = "a cache holds the rows of one" if rows.cache is not None else "a sequence runs through one"
            raise UserError(f"these noise levels belong to blocks {blocks} of the core, but {one}; give all rows "
                            f"levels of one block (blocks.edges)")
        logits, handed = self.read(z, sigma, e, rows.having(block=blocks[0]), **options)
        for block in blocks[1:]:
            own = to_device((owners == block).view(-1, 1, 1), logits.device)
            others, others_handed = self.read(z, sigma, e, rows.having(block=block), **options)
            logits = torch.where(own, others, logits)
            handed = None if handed is None else torch.where(own, others_handed, handed)
        return logits, handed

    def handed_on(self, state: Tensor, D: Noisy | None) -> Tensor | None:
        """The carry to the next step (`denoise.carry`): the soft estimate D in units of sigma_data, the core's output,
        or None."""
        if self.config.carry == "estimate":
            return D / self.edm.sigma_data
        return state if self.config.carry == "latent" else None

    def trace(self, z: Noisy, sigma: Sigma, e: Tensor, rows: Rows = PLAIN, *,
              carry: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(output of the core, input `hidden` of the head), for a loss that does not need the logits of all rows at
        once; `logits(hidden, z, sigma)` gives these. With several blocks, `rows.block` must name one."""
        if (rows.block is None) != (self.edges is None):
            raise UserError("this denoiser has one block; leave block= out" if self.edges is None else
                            f"this denoiser has {len(self.edges) - 1} blocks; name the one to run with block=")
        rows = self._of_block(z, rows)
        state = self._state(z, self.at(z, sigma), e, rows, carry)
        return state, self.model.hidden(state, rows)

    def passed_on(self, z: Noisy, sigma: Sigma, e: Tensor, rows: Rows = PLAIN, *,
                  carry: Tensor | None = None) -> Float[Tensor, "batch length width"]:
        """The output of the core alone, without a readout: the carry of `denoise.carry latent`."""
        return self._state(z, self.at(z, sigma), e, self._of_block(z, rows), carry)

    def logits(self, hidden: Float[Tensor, "batch length width"], z: Noisy,
               sigma: Sigma) -> Float[Tensor, "batch length vocab"]:
        """The logits for the `hidden` that `trace` returns."""
        logits = head_logits(self.model, hidden).float() * self.logit_scale
        return logits + self._log_likelihood(z, self.at(z, sigma)) if self.config.posterior else logits

    def _state(self, z: Noisy, level: Level, e: Tensor, rows: Rows,
               carry: Tensor | None) -> Float[Tensor, "batch length width"]:
        """One step of the core on the preconditioned z."""
        z = cast_for(self.in_proj, z)
        state = self.in_proj(align(level.c_in, z).to(z.dtype) * z)
        if self.carry_proj is not None:  # zeros, not skipped: under DDP every weight needs a gradient
            nothing = z.new_zeros(*z.shape[:-1], self.carry_proj.in_features)
            state = state + self.carry_proj(nothing if carry is None else carry.to(z.dtype))
        if self.config.evidence_in:
            state = state + self.expected_embedding(z, level)
        e = e if self.place is None else self._block_input(e)
        return self.model.step(state, e, level.c_noise, rows)

    def expected_embedding(self, z: Noisy, level: Level) -> Float[Tensor, "batch length width"]:
        """The expected input embedding under the likelihood of z alone: one token's embedding at low noise, the mean
        of all at high noise. With it the rows of a block read each other like clean tokens and need not decode z."""
        probs = self._log_likelihood(z, level).softmax(-1).to(compute_dtype(z))
        scale = getattr(self.model, "embed_scale", 1.0)
        return scale * (probs @ self._embeddings().to(probs.dtype))

    def _block_input(self, e: Float[Tensor, "batch rows width"]) -> Float[Tensor, "batch length width"]:
        """The injected input: the e of the first row of each block, plus the embedding of each row's place."""
        firsts = e[:, :: len(self.place)].unsqueeze(2)  # B N 1 D
        return (firsts + self.place).flatten(1, 2)  # B N k D -> B (N k) D

    def _of_block(self, z: Noisy, rows: Rows) -> Rows:
        """`rows` for their block of the core; with blocks of tokens and no mask, with the mask of whole sequences."""
        rows = rows if rows.block is None else rows.of_block(rows.block)
        if self.place is None or rows.mask is not None:
            return rows
        return rows.having(mask=block_mask(z.shape[1], len(self.place)))

    def evidence(self, z: Noisy, sigma: Sigma) -> tuple[Noisy, Float[Tensor, "vocab dim"]]:
        """(u, table) with `u @ table.T = ln N(z; y_v, sigma^2)` up to a constant: rows of the table share one norm, so
        only `z . y_v / sigma^2` depends on v.

        Added to the logits, it leaves the network to model p(token | context); Bayes' rule does the rest. The part of
        the posterior known in closed form need not be learned, just as c_skip spares a regressor the part that is z.
        """
        return align(to_device(_precision(sigma), z.device), z) * z.float(), self.table()

    def _log_likelihood(self, z: Noisy, level: Level) -> Float[Tensor, "batch length vocab"]:
        u = align(level.precision, z) * z.float()
        with torch.autocast(z.device.type, enabled=False):
            return u @ self.table().T

    def estimate(self, logits: Float[Tensor, "batch length vocab"],
                 uniform: Float[Tensor, "batch length"] | None = None) -> Noisy:
        """D, the clean estimate a solver steps along, by the configured bridge; `sampled` takes `uniform` draws."""
        return bridge(self.config.bridge, logits, self.table(), top_k=self.config.bridge_top_k, uniform=uniform)


def _precision(sigma: Sigma) -> Sigma:
    """1 / sigma^2, in float32."""
    return (1 / sigma.double().square()).float()


def start_projection(dim: int, width: int) -> nn.Linear:
    """Projection from unit-variance inputs to a state on the scale of Huginn's like-init."""
    projection = nn.Linear(dim, width, bias=False)
    nn.init.normal_(projection.weight, std=math.sqrt(2 / (5 * dim)))
    return projection


class Trajectory:
    """One solver trajectory: a denoiser that passes the carry of each network evaluation to the next."""

    def __init__(self, denoiser: Denoiser):
        self.denoiser = denoiser
        self.carry: Tensor | None = None

    def __call__(self, z: Noisy, sigma: Sigma, e: Tensor, rows: Rows = PLAIN, *, steer: Steer | None = None,
                 level: Level | None = None) -> Float[Tensor, "batch length vocab"]:
        """Logits, as by `Denoiser.read`."""
        logits, self.carry = self.denoiser.read(z, sigma, e, rows, carry=self.carry, steer=steer, level=level)
        return logits


class Levels:
    """The levels that solves of a text have in common: each is computed once, and copied to the device once."""

    def __init__(self, denoiser: Denoiser):
        self.denoiser = denoiser
        self._known: dict[tuple[float, ...], Level] = {}

    def __call__(self, z: Noisy, level: float | Tensor) -> Level:
        """One level for all rows of z, or one per row (L,) or (B, L). Raises UserError for one that is not above 0."""
        numbers = torch.as_tensor(level, dtype=torch.float64, device="cpu")
        key = *numbers.shape, *numbers.flatten().tolist()
        if key not in self._known:
            self._known[key] = self.denoiser.at(z, _checked_levels(z, levels_of(z, numbers)))
        return self._known[key]


def _checked_levels(z: Noisy, sigma: Sigma | float) -> Sigma:
    """`sigma` in the form that `read` takes. Raises UserError for a level that is not above 0; levels on a device other
    than the CPU are not checked, which would synchronise it."""
    if isinstance(sigma, str | bytes):
        raise UserError(f"sigma {sigma!r} is text; give a number or a tensor of numbers")
    if not isinstance(sigma, Tensor) or sigma.ndim == 0:
        sigma = levels_of(z, float(sigma))
    if sigma.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = sigma[~((sigma > 0) & (sigma < math.inf))]
        if len(bad):
            raise UserError(f"sigma {bad[0].item():g} is not above 0 and finite; do not evaluate the final 0 of a "
                            f"schedule")
    return sigma


def levels_of(z: Noisy, level: float | Tensor) -> Float64[Tensor, "batch"] | Float64[Tensor, "batch length"]:
    """Levels as the denoiser takes them, on the CPU, from one level for all rows of z or one per row (L,) or (B, L).

    A single level, or (L,) equal ones, become one per sequence (B,), which is cheaper to condition on.
    """
    level = torch.as_tensor(level, dtype=torch.float64, device="cpu")
    if level.ndim == 2:
        return level
    if level.ndim and not bool((level == level[0]).all()):
        return level.expand(z.shape[:2])
    return level.reshape(-1)[:1].expand(len(z))


@functools.lru_cache(maxsize=8)
def block_mask(length: int, block: int) -> CleanNoisyBlocks:
    """The mask of whole sequences, cached so that its form for the backend is built once."""
    return CleanNoisyBlocks(length, block)
