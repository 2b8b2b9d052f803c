"""A training rule in one file: flow matching on token embeddings (Lipman et al. 2023, arXiv 2210.02747), run at a depth
by Euler's method.

    z_t = (1 - t) z_0 + t y,  dz/dt = y - z_0 = (E[y | z_t] - z_t) / (1 - t)

y is the embedding of the next token, a fixed row of unit variance; the network's softmax over all rows is E[y | z_t],
so that cross-entropy trains the velocity (Dieleman et al. 2022, arXiv 2211.15089, for the denoising form of this).
"""

import torch
from torch import nn

from looped.config.rules import Rule
from looped.inference.autoregressive import one_after_another
from looped.inference.cost import Cost
from looped.inference.rollout import Rollout
from looped.nn.rows import PLAIN
from looped.objectives.base import Loss, Objective, head_losses, rows_of_batch, token_losses


class FlowRollout(Rollout):
    """A depth is a number of Euler steps from t = 0 to 1."""

    name, latent = "flow", "point of the flow"

    def logits(self, batch, depth, noise):
        """Logits of all rows at the last of `depth` readings, from `noise`."""
        rows = rows_of_batch(batch)
        e, z = self.model.encode(batch.inputs, rows), noise
        for step in range(depth):
            t = torch.full((len(z),), step / depth, dtype=torch.float64)
            logits = self.objective.read(z, t, e, rows)
            velocity = (logits.softmax(-1) @ self.objective.table - z) / (1 - step / depth)
            z = z + velocity / depth
        return logits

    def losses(self, rows, depths, random):
        batch = self.objective.ask(rows)
        noise = random.normal("noise", (batch.num_rows, self.objective.dim))
        for depth in depths:
            yield depth, token_losses(self.logits(batch, depth, noise), batch.targets), 0.0

    def likelihood_cost(self, depth):
        c = self.model.config
        return Cost(c.num_prelude_layers, (float(c.num_core_layers + c.num_coda_layers),) * depth)

    def write(self, prompt, num_tokens, depth, way):
        return one_after_another(FlowWriter(self, depth, way.steering), prompt, num_tokens, way)


class FlowWriter:
    """Logits of the next token, the text so far being read anew each time."""

    def __init__(self, rollout, depth, steering):
        self.rollout, self.depth, self.steering, self.text = rollout, depth, steering, None

    def next_logits(self, new, random):
        self.text = new if self.text is None else torch.cat([self.text, new], dim=1)
        batch = self.rollout.objective.ask(torch.cat([self.text, self.text[:, -1:]], dim=1))
        noise = random.normal("noise", (batch.num_rows, self.rollout.objective.dim))
        return self.steering(self.rollout.logits(batch, self.depth, noise)[:, -1:])


class FlowMatching(Objective):
    """Cross-entropy of the next token at a time t of its embedding's flow."""

    rule = Rule("flow-matching", kinds=("text",), rollout="own", depth=lambda config: 1, free_depth=True,
                told="denoise.cond_width", reads=("denoise.cond_width", "denoise.target.dim"))
    rollout = FlowRollout

    @classmethod
    def from_config(cls, config, model):
        return cls(model, config.denoise.target.dim or 16)

    def __init__(self, model, dim):
        super().__init__()
        self.model, self.dim = model, dim
        self.table = nn.Parameter(torch.randn(model.vocab_size, dim), requires_grad=False)
        self.in_proj = nn.Linear(dim, model.width)

    def forward(self, tokens, random):
        batch = self.ask(tokens)
        e = self.model.encode(batch.inputs, rows_of_batch(batch))
        t, noise = random.stratified("time"), random.normal("noise", (batch.num_rows, self.dim))
        share = t.to(noise).view(-1, 1, 1)
        hidden = self.hidden((1 - share) * noise + share * self.table[batch.targets], t, e, rows_of_batch(batch))
        value = batch.mean(head_losses(self.model, hidden, batch.targets)).mean()
        return Loss(value, {"loss": value.detach()})

    def hidden(self, z, t, e, rows=PLAIN):
        return self.model.hidden(self.model.step(self.in_proj(z), e, t, rows), rows)

    def read(self, z, t, e, rows=PLAIN):
        """Logits (B, L, V) of points z (B, L, dim) of the flow at times t (B,)."""
        return (self.hidden(z, t, e, rows) @ self.model.head_weight.T).float()

    def layer_forwards(self):
        c = self.model.config
        return 3.0 * (c.num_prelude_layers + c.num_core_layers + c.num_coda_layers)
