"""The command lines of the golden net: tiny runs of every kind of data under every rule, comparisons, benches, errors.

A case is a list of command lines that are run one after another in a folder of their own, with the configs of `write`
in it; `observe` in observed.py says what is kept of them.
"""

from pathlib import Path

import yaml

TEXT = [f"def f{i}(x):\n    return x * {i} + {i * i % 17}  # number {i} of many\n\n" for i in range(240)]

COMMON = {"model": {"width": 16, "num_heads": 2, "num_prelude_layers": 1, "num_core_layers": 1, "num_coda_layers": 1},
          "recurrence": {"mean": 3, "backprop": 2}, "denoise": {"cond_width": 8, "target": {"dim": 4}},
          "optim": {"warmup_steps": 2}, "training": {"batch_size": 4, "budget": 6, "threads": 1, "log_every": 3,
                                                     "eval_every": 3, "sample_every": 3, "checkpoint_every": 0},
          "evaluation": {"depths": [1, 3], "sample_depths": [2], "batch_size": 64}}
"""Every kind, six steps."""

OF_KIND = {
    "text": {"data": {"path": "text", "cache_dir": "tokens", "vocab_size": 270, "length": 8, "heldout": 0.2},
             "evaluation": {"num_sequences": 4, "num_samples": 2, "sample_length": 6, "prompt_length": 4}},
    "puzzle": {"task": {"name": "prefix-sums", "difficulty": [2, 4]}, "denoise": {"context": "inject"},
               "evaluation": {"num_problems": 5, "difficulties": [3, 6]}},
    "classify": {"images": {"source": "digits", "max_train": 64, "max_heldout": 32}, "denoise": {"context": "inject"},
                 "model": {"patch_size": 4}},
    "generate": {"images": {"source": "digits", "goal": "generate", "max_train": 64, "max_heldout": 32},
                 "denoise": {"context": "inject", "weight": "edm"}, "evaluation": {"num_images": 10, "num_samples": 2},
                 "model": {"patch_size": 4, "num_prelude_layers": 0, "num_core_layers": 2, "num_coda_layers": 0,
                           "injection": "none"}},
}

BLOCKS = "--blocks.num=2 --model.num_core_layers=2"
BLOCKWISE = f"--objective=blockwise {BLOCKS}"
BARE = "--model.num_prelude_layers=0 --model.num_coda_layers=0 --model.injection=none"
UNROLLED = {"full": "", "truncated": "", "progressive": "", "one-step": "--supervision.segments=2",
            "fixed-point": "--fixed_point.max_steps=4", "ar": ""}

RULES = {
    "text": {
        **UNROLLED, "full every": "--objective=full --recurrence.loss_on=every --model.injection=gated",
        "full blocks": f"--objective=full {BLOCKS} --recurrence.mean=4",
        "truncated batch": "--objective=truncated --recurrence.per_sequence=false --model.state_init=like-init",
        "implicit": "--objective=fixed-point --fixed_point.max_steps=4 --fixed_point.gradient=implicit",
        "denoise": "", "concat": "--objective=denoise --denoise.context=concat",
        "context": "--objective=denoise --denoise.context=context --denoise.weight=edm",
        "paper": "--objective=denoise --denoise.noise=paper --denoise.solver=heun --denoise.bridge=sampled",
        "adaptive": "--objective=denoise --denoise.noise.distribution=adaptive --denoise.target.tied=true "
                    "--denoise.target.dim=16",
        "steps": "--objective=denoise --denoise.train_steps=2 --denoise.solver=ancestral",
        "carry": "--objective=denoise --denoise.context=concat --denoise.carry=latent --denoise.evidence_in=true",
        "token blocks": "--objective=denoise --denoise.context=context --denoise.block_size=2 "
                        "--denoise.order=left-to-right",
        "blockwise": BLOCKWISE, "blockwise frozen": f"{BLOCKWISE} --blocks.shared=frozen --blocks.choose=mass",
        "masked": "--masked.cond_width=8 --evaluation.levels=2",
        "masked blocks": f"--objective=masked --evaluation.levels=2 {BLOCKS}",
        "documents": "--objective=denoise --data.documents=separate",
        "mixture": "--objective=truncated --data.path=[] '--data.mixture={text: {path: text, weight: 3}, other: {path: "
                   "other}}'",
        "muon": "--objective=truncated --optim.name=muon --optim.ema_decay=0.5 --training.accumulation=2",
        "bf16": "--objective=denoise --training.precision=bf16 --model.qk_norm=true --model.ffn=gelu"},
    "puzzle": {
        **UNROLLED, "denoise": "", "causal": "--objective=denoise --denoise.context=concat --task.layout=causal",
        "confidence": "--objective=denoise --denoise.order=confidence --denoise.settled=surest",
        "trajectories": "--objective=denoise --evaluation.trajectories=2 --evaluation.choose=consistent "
                        "--denoise.solver=ancestral",
        "blockwise": BLOCKWISE,
        "full layout": "--objective=truncated --task.name=sudoku '--task.options={size: 4}' --task.difficulty=[4,6]"},
    "classify": {
        **UNROLLED, "denoise": "--denoise.context_dropout=0.5 --denoise.guidance=2", "blockwise": BLOCKWISE,
        "noprop-dt": BLOCKS, "noprop-ct": "", "noprop-fm": "--noprop.embedding=one-hot",
        "posterior": "--objective=noprop-ct --noprop.solver=posterior",
        "forward-forward": f"--model.num_core_layers=2 {BARE}",
        "hard negatives": f"--objective=forward-forward --model.num_core_layers=2 {BARE} "
                          "--forward_forward.negatives=hard"},
    "generate": {"denoise": "", "guidance": "--objective=denoise --images.label_dropout=0.5 --denoise.guidance=2 "
                                            "--denoise.solver=heun --denoise.schedule=karras",
                 "blockwise": f"{BLOCKWISE}"},
}
"""Kind -> name -> flags; the name is the objective where the flags do not say it."""

WRITES = "generate runs/a --num-tokens 6 --depth 2 --num-samples 2"
AFTER = {"text": [WRITES], "puzzle": [], "classify": [], "generate": ["generate runs/a --depth 2 --num-samples 2"]}
"""Command lines of a kind after training and eval."""


def train(kind, flags, run="a"):
    return f"train {kind}.yaml --run runs/{run} {flags}"


def runs():
    """A run a rule: trained, evaluated, asked to write."""
    for kind, rules in RULES.items():
        for name, flags in rules.items():
            objective = "" if "--objective" in flags else f"--objective={name} "
            yield f"{kind}, {name}", [train(kind, objective + flags), "eval runs/a", *AFTER[kind]]


DEEPER = {
    "text, probes": [train("text", "--objective=ar", "twin"), train("text", "--objective=truncated"),
                     "eval runs/a --twin runs/twin --probes", "info runs/a"],
    "text, judge": [train("text", "--objective=ar", "twin"), train("text", "--objective=ar --seed=1", "judge"),
                    train("text", "--objective=denoise"),
                    "eval runs/a --judge runs/judge --match runs/twin --trajectories 2 --mauve runs/judge "
                    "--evaluation.sample_length 5"],
    "text, solver": [train("text", "--objective=denoise"), "eval runs/a --denoise.solver heun --depths 2",
                     "generate runs/a --temperature 0.5 --top-k 3 --num-tokens 5 --depth 1 --prompt def",
                     "generate runs/a --prompts prompts.txt --num-tokens 5 --depth 2 --json"],
    "text, other": [train("text", "--objective=ar"), "eval runs/a --text other", "eval runs/a --json"],
    "text, blocks alone": [*(train("text", f"{BLOCKWISE} --blocks.shared=frozen --block {block} "
                                           "--training.sample_every=0", f"a-block{block}") for block in (0, 1)),
                           "eval runs/a-block0", "merge runs/a-block0 runs/a-block1 --out runs/a", "eval runs/a",
                           WRITES],
    "puzzle, exits": [train("puzzle", "--objective=truncated"),
                      "eval runs/a --exits kl=1e-2,entropy=1,latent=1e-1,answer,confidence=0.5 --difficulties 3"],
    "puzzle, exits of a denoiser": [train("puzzle", "--objective=denoise"), "eval runs/a --exits kl,answer --depths 4"],
    "generate, features": [train("classify", "--objective=full", "names"), train("generate", "--objective=denoise"),
                           "eval runs/a --features runs/names"],
    "plot": [train("text", "--objective=ar", "twin"), train("text", "--objective=denoise"), "eval runs/a",
             "eval runs/twin", "plot runs/a runs/twin", train("puzzle", "--objective=full", "sums"), "eval runs/sums",
             "plot runs/sums --out sums.png"],
}

COMPARE = "--seeds 2 --depths 1,3 --budget"
COMPARISONS = {
    "compare text": [f"compare text.yaml --objectives ar,truncated,denoise {COMPARE} tokens --amount 160 --out c"],
    "compare masked": [f"compare text.yaml --objectives masked,deep=masked,ar {COMPARE} layer-forwards --amount 800 "
                       "--out c".replace("deep=masked,", "")],
    "compare puzzle": [f"compare puzzle.yaml --objectives full,denoise {COMPARE} layer-forwards --amount 600 --out c"],
    "compare classify": [f"compare classify.yaml --objectives full,noprop-ct {COMPARE} layer-forwards --amount 600 "
                         "--out c"],
    "compare generate": ["compare generate.yaml --objectives 'denoise,two=blockwise blocks.num=2' "
                         f"{COMPARE} layer-forwards --amount 600 --out c"],
}

BENCHES = {
    f"bench {kind}": [f"bench step {kind}.yaml --repeats 1 --json --objectives {arms}"]
    for kind, arms in {"text": "full,denoise:concat,masked", "puzzle": "truncated,denoise", "classify":
                       "noprop-ct,ar", "generate": "denoise"}.items()
} | {"bench memory": ["bench memory text.yaml --repeats 1 --json --blocks 1,2 --model.num_core_layers=2 "
                      "--blocks.shared=frozen"]}

STRANGERS = {  # what each verb says to flags and settings that are of another kind, rule or form
    kind: [f"eval runs/a {flags}" for flags in (
        "--difficulties 3", "--exits kl", "--features runs/a", "--probes", "--twin runs/a", "--judge runs/a",
        "--match runs/a", "--mauve runs/a", "--trajectories 2", "--text other", "--depths 0", "--depths x")]
    + [f"generate runs/a {flags}" for flags in ("", "--guidance 2", "--out x.png", "--prompt x", "--top-k 2",
                                                "--depth 0", "--stop x")]
    + [f"compare {kind}.yaml --budget tokens --amount 9 --difficulties x",
       f"compare {kind}.yaml --budget tokens --amount 9 --objectives full,full",
       f"compare {kind}.yaml --budget tokens --amount 9 --objectives nonsense",
       f"bench flops {kind}.yaml --repeats 0", "plot runs/a --metric nonsense"]
    for kind in OF_KIND}
ERRORS = {f"errors, {kind}": [train(kind, "--objective=denoise"), *lines] for kind, lines in STRANGERS.items()} | {
    "errors, masked": [train("text", "--objective=masked --evaluation.levels=2"), *(
        f"eval runs/a {flags}" for flags in ("--probes", "--twin runs/a", "--trajectories 2"))],
    "errors, rules": [f"info {kind}.yaml --objective={rule} {flags}" for kind in OF_KIND for rule, flags in (
        ("masked", ""), ("noprop-dt", ""), ("noprop-ct", "--blocks.num=2 --model.num_core_layers=2"),
        ("forward-forward", ""), ("blockwise", ""), ("denoise", "--blocks.num=2 --model.num_core_layers=2"),
        ("full", "--recurrence.loss_on=every --denoise.noise=paper"), ("one-step", "--recurrence.loss_on=every"),
        ("fixed-point", "--blocks.num=2 --model.num_core_layers=2"), ("denoise", "--denoise.guidance=2"),
        ("denoise", "--denoise.carry=latent"), ("blockwise", "--blocks.num=2 --denoise.train_steps=2"),
        ("nonsense", ""), ("full", "--model.widht=3"))],
    "errors, files": ["train none.yaml", "eval runs/none", "generate runs/none", "compare none.yaml --budget tokens",
                      "plot runs/none", "merge runs/none --out runs/b", "info runs/none", "bench step", "nonsense",
                      "train text.yaml --data.path=none", "train puzzle.yaml --task.name=none",
                      "train classify.yaml --images.source=none", "train text.yaml --training.batch_size=0"],
}
PRINTED = {
    f"info, {kind}": [f"info {kind}.yaml --objective={rule} {flags}" for rule, flags in rules] for kind, rules in {
        "text": (("full", ""), ("truncated", ""), ("progressive", ""), ("one-step", ""), ("fixed-point", ""),
                 ("ar", ""), ("denoise", ""), ("denoise", "--denoise.context=concat"),
                 ("denoise", "--denoise.context=context"),
                 ("masked", ""), ("blockwise", BLOCKS), ("blockwise", f"{BLOCKS} --blocks.shared=frozen"),
                 ("masked", BLOCKS), ("full", f"{BLOCKS} --recurrence.mean=4")),
        "puzzle": (("truncated", ""), ("denoise", ""), ("blockwise", BLOCKS)),
        "classify": (("noprop-dt", BLOCKS), ("noprop-ct", ""), ("noprop-fm", ""), ("ar", ""),
                     ("forward-forward", BARE)),
        "generate": (("denoise", ""), ("blockwise", BLOCKS))}.items()
} | {"dry run": ["train text.yaml --dry-run", "train generate.yaml --dry-run --model.widht=3"]}

CASES = dict(runs()) | DEEPER | COMPARISONS | BENCHES | ERRORS | PRINTED


def merged(*sections):
    """Nested settings on top of each other."""
    found = {}
    for section in sections:
        for name, value in section.items():
            found[name] = merged(found.get(name, {}), value) if isinstance(value, dict) else value
    return found


def write(folder: Path) -> None:
    """The texts and the config of each kind."""
    for name, texts in (("text", TEXT), ("other", [line.upper() for line in TEXT])):
        (folder / name).mkdir()
        for part in range(8):
            some = texts[part * len(texts) // 8 : (part + 1) * len(texts) // 8]
            (folder / name / f"{part}.txt").write_text("".join(some))
    (folder / "prompts.txt").write_text("def f\nreturn x\n")
    for kind, settings in OF_KIND.items():
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump(merged(COMMON, settings)))
