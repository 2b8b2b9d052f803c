"""A judge's figure is its own loss on the text after the prompt, and a judge of another vocabulary is refused."""

import pytest
import torch

from looped.config import load_config
from looped.errors import UserError
from looped.evaluation.judge import Judge
from looped.inference.generate import generate
from looped.models.build import build
from looped.objectives import build_objective

V = 40


@pytest.fixture
def judge():
    config = load_config(None, {"objective": "truncated", "model.width": 16, "model.num_heads": 2,
                                "model.state_init": "zero"})
    objective = build_objective(config, build(config, V)).eval()
    objective.model.embed.weight.data.mul_(4)
    return Judge("judge", objective, 3, "vocabulary")


def rows(num=5, length=12):
    return torch.randint(V, (num, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_the_figure_is_the_loss_of_the_text_alone(judge):
    tokens = rows()
    logits = judge.objective.model(tokens, 3)
    losses = -torch.log_softmax(logits[:, :-1], -1).gather(-1, tokens[:, 1:, None])[..., 0]
    read = judge.read(tokens[:, :4], tokens[:, 4:]).per_token
    torch.testing.assert_close(read.float(), losses[:, 3:].mean(1))  # the model's own float32 rounds by batch


def test_a_judge_finds_its_own_likeliest_text_cheaper_than_chance(judge):
    prompts = rows()[:, :4]
    own = generate(judge.objective, prompts, num_tokens=8, depth=3, temperature=0.0)
    assert judge.read(prompts, own).per_token.mean() + 0.5 < judge.read(prompts, rows()[:, 4:]).per_token.mean()


def test_a_judge_that_reads_what_follows_a_text_is_refused():
    """Blocks of several tokens see one another, and so what fills up a text that has ended."""
    config = load_config(None, {"objective": "denoise", "denoise.block_size": 2, "denoise.context": "concat",
                                "model.width": 16, "model.num_heads": 2, "denoise.cond_width": 8,
                                "denoise.target.dim": 8})
    with pytest.raises(UserError, match=r"judge theirs denoises blocks of 2 tokens.*--objective ar"):
        Judge("theirs", build_objective(config, build(config, V)), 3, "vocabulary")


def test_another_vocabulary_is_refused(judge):
    judge.check("writer", "vocabulary")
    with pytest.raises(UserError, match="another tokenizer than writer"):
        judge.check("writer", "another")
