"""Time and peak memory of `looped import` for a model of Llama-3.2-1B's layout, in bfloat16 shards with random weights.

    python scripts/import_memory.py [--folder DIR] [--rounds 3]

Peak memory is the maximum resident size of the importing process, given with and without that of importing torch alone.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 2048, 8192, 16, 32, 8, 64, 128_256
CONFIG = {"model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": HIDDEN,
          "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
          "head_dim": HEAD_DIM, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "tie_word_embeddings": True,
          "hidden_act": "silu", "torch_dtype": "bfloat16"}
PEAK = "import resource, sys; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
IMPORT = f"from looped.cli import main; code = main(sys.argv[1:]); {PEAK.split('; ')[1]}; sys.exit(code)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="a folder with 12 GB free; default: a temporary folder")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        size = write_model(Path(folder) / "model")
        print(f"weights: {size / 1e9:.3f} GB in bfloat16, {LAYERS + 1} shards")
        bare = int(run(f"import resource, sys, torch, looped.models.build; {PEAK.split('; ')[1]}")[0])
        for number in range(arguments.rounds):
            begun = time.perf_counter()
            out = Path(folder) / f"run{number}"
            lines = run(f"import resource, sys; {IMPORT}", "import", str(Path(folder) / "model"), "--out", str(out),
                        "--layers", "4/8/4")
            seconds, peak = time.perf_counter() - begun, int(lines[-1])
            print(f"import {number}: {seconds:.1f} s, peak {peak * 1024 / 1e9:.3f} GB resident, of which torch "
                  f"{bare * 1024 / 1e9:.3f}; {peak * 1024 / size:.2f} x the weights, without torch "
                  f"{(peak - bare) * 1024 / size:.2f} x")
            for file in sorted(out.rglob("*.safetensors")):
                file.unlink()


def run(code: str, *arguments: str) -> list[str]:
    """The lines that `code` prints in a child process."""
    return subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True,
                          text=True).stdout.splitlines()


def write_model(folder: Path) -> int:
    """Write a model's folder, shard by shard; returns the bytes of its weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8", newline="")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate([*letters, "<|endoftext|>"])}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(folder / "tokenizer.json"))
    places, size = {}, 0
    torch.manual_seed(0)
    for number in range(LAYERS + 1):
        shapes = layer(number) if number < LAYERS else {"model.embed_tokens.weight": (VOCAB, WIDTH),
                                                        "model.norm.weight": (WIDTH,)}
        name = f"model-{number:05d}.safetensors"
        tensors = {key: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02) for key, shape in shapes.items()}
        save_file(tensors, folder / name)
        places |= dict.fromkeys(tensors, name)
        size += sum(tensor.numel() * 2 for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8", newline="")
    return size


def layer(number: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's tensors."""
    attention, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {"self_attn.q_proj": (attention, WIDTH), "self_attn.k_proj": (kv, WIDTH), "self_attn.v_proj": (kv, WIDTH),
              "self_attn.o_proj": (WIDTH, attention), "mlp.gate_proj": (HIDDEN, WIDTH), "mlp.up_proj": (HIDDEN, WIDTH),
              "mlp.down_proj": (WIDTH, HIDDEN), "input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,)}
    return {f"model.layers.{number}.{name}.weight": shape for name, shape in shapes.items()}


if __name__ == "__main__":
    main()
