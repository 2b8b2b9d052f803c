"""Masked diffusion: each hidden token is predicted from all visible ones (MD4, Shi et al. 2024, arXiv 2406.04329,
section 3).

    t ~ U(0, 1) over the batch, m = 1 - alpha(t), loss = w(t) / L * sum over hidden tokens of -ln p(token | visible, m)

Its mean is the bound on -ln p(x) per token. One pass of the network: e = encode(tokens, hidden ones as the mask token)
with full attention, state = step(e, e, level), logits = decode(state). The core receives the level through the
noise-level embedding as ln(m / (1 - m)) / 4, a quarter of the log-odds, as EDM's c_noise is a quarter of ln sigma.

With several blocks, the levels are divided by equal decrements of alpha, and each training step trains one block
(DiffusionBlocks, arXiv 2506.14202). A core of one block is trained at all levels; with the same layers it is the
end-to-end baseline of several blocks.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from looped.config import Config
from looped.config.blocks import BlocksConfig
from looped.config.masked import MaskedConfig
from looped.data.batch import Batch
from looped.devices import to_device, to_like
from looped.diffusion import masking
from looped.diffusion.masking import hide, hide_one_and, mask_edges
from looped.diffusion.noise import block_of
from looped.models.language import LanguageModel
from looped.nn.projection import head_logits
from looped.nn.rows import Rows
from looped.objectives.active_block import OneBlock
from looped.objectives.base import EVERYBODY, Loss, Objective, head_losses, rows_of_batch
from looped.rng import StepRandom
from looped.tensor_types import Float, Float64, Int

LEAST = 1e-4
"""Levels given to the core are clamped to this distance from 0 and 1, where the log-odds diverge."""

Tokens = Int[Tensor, "batch length"]
Levels = Float64[Tensor, "batch"]


TOGETHER = Rows(mask=EVERYBODY)


class Masked(Objective):
    """One core for all levels. metrics: `cross_entropy`, the unweighted mean over the hidden tokens.

    In evaluation mode the loss is the bound itself, at one level per sequence, without the weights' variance.
    """

    rollout = "unmask"

    @classmethod
    def from_config(cls, config: Config, model: nn.Module) -> Objective:
        """The rule of a config; `MaskedBlocks` if the core has several blocks."""
        if config.blocks.num > 1:
            return MaskedBlocks(model, config.masked, config.blocks)
        return cls(model, config.masked)

    def __init__(self, model: LanguageModel, config: MaskedConfig):
        super().__init__()
        self.model = model
        self.config = config
        self.edges: Tensor = mask_edges(len(model.core_layers))

    def forward(self, tokens: Int[Tensor, "batch length_and_one"] | Batch, random: StepRandom) -> Loss:
        """The loss of tokens[:, 1:], the tokens that other rules predict."""
        batch = self.ask(tokens)
        return self.training_loss(batch, random) if self.training else self.bound(batch, random)

    def ask(self, tokens: Int[Tensor, "batch length_and_one"] | Batch) -> Batch:
        """As for every rule, but with attention in both directions."""
        return replace(super().ask(tokens), causal=False)

    def training_loss(self, batch: Batch, random: StepRandom) -> Loss:
        return self.loss_between(batch, 0.0, 1.0, random)

    def loss_between(self, batch: Batch, low: float, high: float, random: StepRandom, *, scale: float = 1.0,
                     block: int | None = None) -> Loss:
        """The weighted loss at random times of levels in [low, high]; `block`: the one to run, if there are several."""
        tokens = batch.targets
        ends = masking.time_of(self.config.schedule, torch.tensor([low, high], dtype=torch.float64))
        t = ends[0] + (ends[1] - ends[0]) * random.stratified("time")
        m, w = masking.level(self.config.schedule, t), scale * masking.weight(self.config.schedule, t)
        shown, hidden = hide(tokens, m, random.uniform("hidden", tokens.shape[1:]), self.model.mask_token)
        losses = head_losses(self.model, self.read(shown, m, rows_of_batch(batch).having(block=block)), tokens) * hidden
        value = (to_like(w, losses) * losses.mean(1)).mean()
        mean = losses.detach().sum() / hidden.sum().clamp(min=1)
        return Loss(value, {"loss": value.detach(), "cross_entropy": mean})

    def bound(self, batch: Batch, random: StepRandom) -> Loss:
        """The bound at one level per sequence, spread over the batch."""
        losses = self.losses_at(batch, random.stratified("time"), random, "hidden")
        return Loss(losses.mean(), {"loss": losses.detach().mean(), "cross_entropy": losses.detach().mean()})

    def losses_at(self, batch: Batch, m: Levels, random: StepRandom, stream: str) -> Float[Tensor, "batch"]:
        """Mean cross-entropy of each sequence's hidden tokens, at least one, at the sequence's level; its mean over
        m ~ U(0, 1) is the bound in nats/token (`hide_one_and`)."""
        tokens = batch.targets
        uniform = random.uniform(stream, (tokens.shape[1] + 1,))
        shown, hidden = hide_one_and(tokens, m, uniform, self.model.mask_token)
        losses = head_losses(self.model, self.read_by_owners(shown, m, rows_of_batch(batch)), tokens)
        return (losses * hidden).sum(1) / hidden.sum(1)

    def read(self, tokens: Tokens, m: Levels, rows: Rows = TOGETHER) -> Float[Tensor, "batch length width"]:
        """The input of the head, for tokens partly replaced by the mask token, at levels m."""
        e = self.model.encode(tokens, rows)
        level = torch.logit(m, eps=LEAST) / 4 if self.config.cond_width else None
        return self.model.hidden(self.model.step(e, e, level, rows), rows)

    def read_by_owners(self, tokens: Tokens, m: Levels, rows: Rows = TOGETHER) -> Float[Tensor, "batch length width"]:
        """`read` with each sequence through the block that owns its level."""
        owners = self.owners(m)
        order, parts = owners.argsort(stable=True), []
        blocks, counts = owners.unique(return_counts=True)
        if len(blocks) == 1:
            return self.read(tokens, m, rows.having(block=int(blocks)))
        for block, some in zip(blocks.tolist(), order.split(counts.tolist()), strict=True):
            own = to_device(some, tokens.device)
            parts.append(self.read(tokens[own], m[some], rows.of(some).having(block=block)))
        return torch.cat(parts)[to_device(order.argsort(), tokens.device)]

    def logits(self, tokens: Tokens, m: Levels, rows: Rows = TOGETHER) -> Float[Tensor, "batch length vocab"]:
        """Logits of the tokens themselves, hidden or not."""
        return head_logits(self.model, self.read_by_owners(tokens, m, rows))

    def owners(self, m: Levels) -> Int[Tensor, "batch"]:
        """The block of the core that owns each level."""
        return block_of(m, self.edges)

    @property
    def reading_layers(self) -> float:
        """Mean number of core layers per network evaluation in training."""
        return sum(self.model.core_layers)

    def layer_forwards(self) -> float:
        c = self.model
        return 3.0 * (c.num_prelude_layers + self.reading_layers + c.num_coda_layers)


class MaskedBlocks(OneBlock, Masked):
    """Several blocks, one of which each optimiser step trains, on its own levels and, by `blocks.overlap`, on some of
    its neighbours'. metrics: also `ce_block0`, ... of the active block."""

    def __init__(self, model: LanguageModel, config: MaskedConfig, blocks: BlocksConfig):
        super().__init__(model, config)
        self.setup_block_sampling(blocks, masking.block_shares(blocks, config.schedule), [
            masking.mask_interval(block, self.edges, blocks.overlap) for block in range(blocks.num)])
        # These make the mean loss over all steps the bound, however often each block is drawn.
        self.scales: list[float] = (masking.block_times(config.schedule, blocks.num) / self.shares).tolist()

    def training_loss(self, batch: Batch, random: StepRandom) -> Loss:
        return self.loss_of(self.activate_block(random), batch, random)

    def loss_of(self, block: int, batch: Batch, random: StepRandom) -> Loss:
        """The loss of one block, independent of the others."""
        loss = self.loss_between(batch, *self.intervals[block], random, scale=self.scales[block], block=block)
        return Loss(loss.value, loss.metrics | {f"ce_block{block}": loss.metrics["cross_entropy"]}, loss.shares)
