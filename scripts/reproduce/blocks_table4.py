"""Tables 4 and A3 of DiffusionBlocks (arXiv 2506.14202): an autoregressive language model of twelve layers trained end
to end, and in four blocks that each denoise the next token at noise levels of their own, judged by what they write.

    python scripts/reproduce/blocks_table4.py --scale cpu --seeds 1   # half an hour; 75 minutes for three
    python scripts/reproduce/blocks_table4.py --scale paper           # LM1B, 12 layers of width 768: a GPU, and days

Both get the same number of layer forwards, so the blocks, which run a quarter of the core in a step, take 2.5 to 2.8
times the steps. `cpu` keeps the four blocks, on the default corpus; an autoregressive run of another seed stands in for
the judge and the encoder. The same command again goes on where it was interrupted. Any setting of `looped train` can be
added, as in --data.path "texts/*.jsonl".
"""

import sys

from written import Scale, Table, Writer

TABLE = Table(
    "blocks_table4", "An autoregressive model end to end and in four blocks", "on LM1B, and on OpenWebText",
    {"end-to-end": Writer({"objective": "ar"}, 1, (4,), {"MAUVE": 0.50, "OWT MAUVE": 0.85}),
     "four-blocks": Writer({"objective": "blockwise"}, 1, (4, 8, 16), {"MAUVE": 0.71, "OWT MAUVE": 0.82})},
    {"cpu": Scale("stdlib-blockwise.yaml", {
        "blocks.num": 4, "blocks.layers": None, "model.num_core_layers": 8, "evaluation.num_samples": 256,
        "training.threads": 1}, 400_000, "layer-forwards", None, None),
     # LM1B's 30.3 million sentences are 0.8 billion words; they are packed into sequences.
     "paper": Scale("stdlib-blockwise.yaml", {
         "blocks.num": 4, "blocks.layers": None, "model.num_core_layers": 12, "model.width": 768, "model.num_heads": 12,
         "data.dataset": "billion-word-benchmark/lm1b", "data.max_bytes": 10**10, "data.vocab_size": 32_000,
         "optim.lr": 3e-4, "optim.warmup_steps": 2000, "training.batch_size": 512, "training.precision": "bf16",
         "training.threads": None, "evaluation.num_samples": 5000, "evaluation.sample_length": 96},
         10**5 * 512 * 3 * 14, "layer-forwards", ("gpt2-xl", "meta-llama/Llama-2-7b-hf"), "gpt2-large")})

if __name__ == "__main__":
    sys.exit(TABLE.main(__doc__))
