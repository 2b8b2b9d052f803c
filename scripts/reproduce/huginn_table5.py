"""Table 5 of DiffusionBlocks (arXiv 2506.14202): a recurrent-depth model trained by truncated back-propagation, and
the same model trained by single-pass denoising for three times as many epochs, judged by what they write.

    python scripts/reproduce/huginn_table5.py --scale cpu --seeds 1   # under an hour on two cores
    python scripts/reproduce/huginn_table5.py --scale paper           # LM1B, 2/4/2 layers of width 512: a GPU, and days

`cpu` keeps the structure, 2/4/2 layers, mean depth 32 with gradients through 8, and the ratio of epochs, on the default
corpus; an autoregressive run of another seed stands in for the judges and the encoder. The paper's figures are printed
beside, as what to compare the direction with. The same command again goes on where it was interrupted. Any setting of
`looped train` can be added, as in --data.path "texts/*.jsonl".
"""

import sys

from written import Scale, Table, Writer

DEPTHS = (1, 4, 32)
TABLE = Table(
    "huginn_table5", "A recurrent-depth model by truncated back-propagation and by single-pass denoising",
    "on LM1B at width 512",
    {"truncated": Writer({"objective": "truncated"}, 5, DEPTHS, {"MAUVE": 0.49, "GPT2-XL": 46.73, "Llama-2": 17.04},
                         "5 epochs"),
     "denoise": Writer({"objective": "denoise"}, 15, DEPTHS, {"MAUVE": 0.70, "GPT2-XL": 42.43, "Llama-2": 16.08},
                       "15 epochs")},
    {"cpu": Scale("stdlib-denoise.yaml", {
        "model.num_prelude_layers": 2, "model.num_core_layers": 4, "model.num_coda_layers": 2, "recurrence.mean": 32,
        "recurrence.backprop": 8, "evaluation.num_samples": 256, "training.threads": 1}, 80 * 1024, "tokens", None,
        None),
     # LM1B's 30.3 million sentences are 0.8 billion words; documents are packed, as everywhere in this toolkit.
     "paper": Scale("huginn-70m.yaml", {
         "data.dataset": "billion-word-benchmark/lm1b", "data.max_bytes": 10**10, "data.length": 128,
         "training.batch_size": 512, "evaluation.num_samples": 5000, "evaluation.sample_length": 96},
         1_000_000_000, "tokens", ("gpt2-xl", "meta-llama/Llama-2-7b-hf"), "gpt2-large")})

if __name__ == "__main__":
    sys.exit(TABLE.main(__doc__))
