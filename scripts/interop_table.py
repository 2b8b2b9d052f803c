"""Table of numerical differences per family: imported models from their references, exported ones from themselves.

    python scripts/interop_table.py

Tiny random folders in each published layout, as tests/hub makes them.

reference  largest difference of float64 logits from transformers' own class, or from the equations if there is none,
           after 1, 4 and 8 steps (a stack: its one pass)
back       tensors that are bit for bit those of the folder after a round trip
cached     largest difference of float64 logits between tokens read one by one with a cache and the whole text at once
alone      largest difference between a batch padded on the left and each of its rows alone, after 4 steps
texts      "the same" if greedy texts agree with and without the cache, and in a batch and alone
"""

import math
import sys
import tempfile
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "hub"))

import looped_folders
import test_looped_families as equations
import transformers
from safetensors.torch import load_file
from test_pretrained import change, cut_logits, saved, tokens
from test_wrapper import held, written

from looped.hub.families import open_pretrained, read_pretrained
from looped.hub.wrapper import LoopedForCausalLM
from looped.objectives import build_objective

STEPS = (1, 4, 8)
STACKS = ("Llama", "Mistral", "Qwen2", "Qwen3", "Olmo2", "SmolLM3")
HEADER = ("family", "reference at 1", "at 4", "at 8", "back", "cached at 1", "at 4", "at 8", "alone", "texts")


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER))
    for name in (*STACKS, "Llama 2/2/1", "Huginn", "Retrofit of Llama", "Retrofit of OLMo2", "Ouro", "Nanbeige"):
        with tempfile.TemporaryDirectory() as folder, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            print("| " + " | ".join([name, *line(name, Path(folder))]) + " |", flush=True)


def line(name: str, folder: Path) -> list[str]:
    """The table cells of a family."""
    reference = REFERENCES.get(name, stack)(name, folder)
    ours, config = read_pretrained(folder, layers="2/2/1" if name == "Llama 2/2/1" else None)
    ours = ours.double()
    noise = looped_folders.draw(7)(2, looped_folders.LENGTH, looped_folders.WIDTH).double()
    noise = noise if ours.recurrence.needs_noise else None
    depths = (1,) if name in STACKS else STEPS
    found = {depth: (ours(tokens(), depth, noise=noise) - reference(depth, noise)).abs().max().item()
             for depth in depths}
    model = held(build_objective(config, ours, None).eval(), config)
    return [*(f"{found[depth]:.1e}" if depth in found else "" for depth in STEPS), back(folder, config, ours),
            *(f"{cached(model, depth):.1e}" if depth in found else "" for depth in STEPS), f"{alone(model):.1e}",
            texts(model)]


def back(folder: Path, config, ours: torch.nn.Module) -> str:
    """The number of tensors that survive a round trip bit for bit, of all that are read."""
    there, source = load_file(folder / "model.safetensors"), open_pretrained(folder)
    weights = {key: value.float() for key, value in read_pretrained(folder)[0].state_dict().items()}
    made = {name: tensor for link in source.links for name, tensor in link.write([weights[key] for key in link.ours])}
    same = sum(torch.equal(made[key], there[key]) for key in made)
    return f"{same} of {len(made)}"


def cached(model: LoopedForCausalLM, depth: int) -> float:
    whole, kept, parts = model(tokens(), num_steps=depth).logits, None, []
    for column in range(tokens().shape[1]):
        out = model(tokens()[:, column : column + 1], num_steps=depth, past_key_values=kept, use_cache=True)
        kept, parts = out.past_key_values, [*parts, out.logits]
    return (torch.cat(parts, dim=1) - whole).abs().max().item()


def alone(model: LoopedForCausalLM) -> float:
    lengths = (40, 25)
    mask = torch.tensor([[0] * (40 - n) + [1] * n for n in lengths])
    together = model(tokens(), attention_mask=mask, num_steps=4).logits
    return max((together[row, 40 - n:] - model(tokens()[row : row + 1, 40 - n:], num_steps=4).logits[0]).abs().max()
               .item() for row, n in enumerate(lengths))


def texts(model: LoopedForCausalLM) -> str:
    ids, mask = tokens()[:, :12], torch.tensor([[1] * 12, [0] * 5 + [1] * 7])
    caches = [torch.equal(written(model, ids, num_steps=depth), written(model, ids, num_steps=depth, use_cache=False))
              for depth in STEPS]
    together = written(model, ids, attention_mask=mask)
    rows = [torch.equal(together[row], written(model, ids[row : row + 1, first:])[0])
            for row, first in enumerate((0, 5))]
    return "the same" if all(caches + rows) else "NOT the same"


# ---- references: (depth, noise) -> logits ---------------------------------------------------------------------------

def stack(name: str, folder: Path):
    theirs = saved(folder, name, looped_folders.WIDE).double()
    return lambda depth, noise: theirs(tokens(), use_cache=False).logits


def cut(name: str, folder: Path):
    theirs = saved(folder, "Llama", looped_folders.WIDE).double()
    expected = cut_logits(theirs, [0, 1, 3, 4, 5])
    return lambda depth, noise: expected


def huginn(name: str, folder: Path):
    raw, tensors = looped_folders.huginn(folder)
    return lambda depth, noise: equations.huginn_logits(raw, tensors, depth,
                                                        math.sqrt(2 / 5) * equations.cut_normal(noise))


def retrofit(name: str, folder: Path):
    adapter = looped_folders.draw(7)(32, 64, scale=0.1)
    theirs = looped_folders.retrofit(folder, "Llama" if name.endswith("Llama") else "Olmo2", adapter)
    scale = looped_folders.STD
    return lambda depth, noise: equations.retrofit_logits(theirs.double(), adapter.double(), depth,
                                                          scale * equations.cut_normal(noise))


def ouro(name: str, folder: Path):
    tensors = looped_folders.ouro(folder)
    return lambda depth, noise: equations.ouro_logits(tensors, depth)


def nanbeige(name: str, folder: Path):
    theirs = saved(folder, "Llama", looped_folders.WIDE).double()
    change(folder, model_type="nanbeige", num_loops=2)

    def logits(depth: int, noise):
        inner, x, place = theirs.model, theirs.model.embed_tokens(tokens()), torch.arange(40)[None]
        angles, mask = inner.rotary_emb(x, place), torch.full((40, 40), -torch.inf).double().triu(1)[None, None]
        for _ in range(depth):
            for layer in inner.layers:
                x = layer(x, attention_mask=mask, position_ids=place, position_embeddings=angles)
                x = x[0] if isinstance(x, tuple) else x
            x = inner.norm(x)
        return theirs.lm_head(x)

    return logits


REFERENCES = {"Llama 2/2/1": cut, "Huginn": huginn, "Retrofit of Llama": retrofit, "Retrofit of OLMo2": retrofit,
              "Ouro": ouro, "Nanbeige": nanbeige}

if __name__ == "__main__":
    main()
