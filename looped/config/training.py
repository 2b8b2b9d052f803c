"""Settings of training and evaluation: optimiser, budget, batch, reports, and held-out data."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from looped.config.base import Count, Depth, Fraction, NonNegative, Positive, Section, named_or_path
from looped.config.choices import CHOICES


def _compile_by_word(value: Any) -> Any:
    """`training.compile` from a flag or a file, where true is the step alone."""
    return {"true": "step", "false": False}.get(str(value).lower(), value)


Decay = Annotated[float, Field(ge=0, lt=1)]
"""The part of a running mean that is kept in a step."""


class OptimConfig(Section):
    """Optimiser, learning-rate schedule, clipping and weight averaging."""

    name: Literal["adamw", "muon"] = Field(
        default="adamw", description="muon: Muon for the matrices, AdamW for the rest")
    lr: Positive = Field(default=2e-3, description="peak learning rate of AdamW")
    muon_lr: Positive = Field(default=2e-2, description="peak learning rate of Muon")
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.95), description="AdamW's moment decays")
    weight_decay: NonNegative = Field(default=0.1, description="decoupled decay of matrices; vectors have none")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        default="cosine", description="after warmup: cosine, stable-then-decay, flat")
    warmup_steps: Count = Field(default=50, description="linear warmup")
    decay_fraction: Fraction = Field(default=0.2, description="final fraction of the budget over which wsd decays")
    min_lr_fraction: Fraction = Field(default=0.1, description="learning rate at the end, as a fraction of the peak")
    grad_clip: NonNegative = Field(default=1.0, description="maximum gradient norm; 0 disables clipping")
    ema_decay: Decay = Field(default=0.0, description="decay of the EMA weights; 0 keeps none")


class TrainingConfig(Section):
    """Budget, batch, precision, and the intervals of logs, evaluations, samples and checkpoints."""

    batch_size: Depth = Field(
        default=32, description="sequences per optimiser step, over all processes and micro-batches")
    accumulation: Depth = Field(default=1, description="micro-batches per optimiser step")
    budget: int = Field(default=1000, ge=1, description="training budget, in budget_unit")
    budget_unit: Literal["steps", "tokens", "layer-forwards", "seconds"] = Field(
        default="steps", description="unit of the budget")
    clock: Literal["wall", "processor"] = Field(
        default="wall",
        description="clock for seconds of training: wall-clock time, or CPU time (all threads together), which other "
                    "programs on the machine do not lengthen")
    precision: Literal["auto", "fp32", "bf16", "native"] = Field(
        default="auto",
        description="of matrix products; bf16 runs under autocast; auto: bf16 on CUDA devices that have it, fp32 "
                    "elsewhere; native: bf16 on CPUs with AVX512-BF16 or AMX as well")
    tf32: bool = Field(
        default=True, description="on CUDA, run the products that are left in float32 in TF32; false: in full float32")
    deterministic: bool = Field(
        default=False,
        description="use kernels alone that give the same bits each time, on CUDA too, where they are slower; an "
                    "operation without one is an error")
    rng: Literal["host", "device"] = Field(
        default="host",
        description="where a training step's normal draws are made: on the host, ahead of their step, the same bits "
                    "for every device; or on the device, by Philox, other numbers and on every device the same but "
                    "for rounding")
    threads: int | None = Field(default=None, ge=1, description="CPU threads; null: torch's default")
    shard: Literal["none", "fsdp"] = Field(
        default="none",
        description="several processes: none keeps the whole model on each (DDP); fsdp shards weights, gradients, "
                    "averages and the optimiser's state over them (FSDP2), and gathers the weights once per step")
    lost_after: Positive = Field(
        default=60, description="seconds without a heartbeat after which one of several processes counts as lost, "
                                "which ends the others")
    log_every: Depth = Field(default=10, description="steps between lines of metrics.jsonl")
    eval_every: Count = Field(default=0, description="steps between evaluations; 0 evaluates at the end only")
    num_evals: Count = Field(default=0, description="evaluations spread evenly over the budget, whatever its unit")
    sample_every: Count = Field(
        default=0, description="steps between printed samples, or pictures in samples/; 0 makes none")
    checkpoint_every: Count = Field(default=200, description="steps between checkpoints; 0 saves at the end only")
    keep_checkpoints: Depth = Field(
        default=2,
        description="number of newest checkpoints that are kept; under optim.schedule wsd also the newest one from "
                    "before the decay, from which a larger budget can continue")
    background_saves: bool = Field(
        default=True,
        description="write checkpoints while training goes on, from a copy of weights, averages and optimiser state in "
                    "host memory; false: training waits, and needs no copy")
    warm_start: str | None = Field(
        default=None, description="a run whose model weights are copied before the first step")
    other_data: bool = Field(
        default=False, description="allow warm_start and blocks.edges_from to be runs on other data")
    checkpoint_activations: bool = Field(
        default=False,
        description="activation checkpointing: keep only each layer's input and recompute the layer in backward; less "
                    "memory for a third more time, with the same gradients; not applied to rows that a cache keeps "
                    "(concat)")
    compile: Annotated[Literal[False, "step", "objective", "cuda-graphs"], BeforeValidator(_compile_by_word)] = Field(
        default=False,
        description="torch.compile the loop step, whose graph serves any depth, or the whole rule, forward and "
                    "backward, if its depth is fixed, and the updates of Muon; cuda-graphs: as objective, its kernels "
                    "replayed by one launch")
    wandb: Literal["off", "online", "offline"] = Field(default="off", description="log to Weights & Biases too")


class EvaluationConfig(Section):
    """Evaluation on held-out data, and the samples of `training.sample_every`."""

    depths: tuple[Depth, ...] = Field(
        default=(1, 2, 4, 8, 16, 32, 64), min_length=1, description="loop or solver steps that `looped eval` measures")
    sample_depths: tuple[Depth, ...] = Field(
        default=(1, 4), min_length=1, description="loop or solver steps of the samples during training")
    num_sequences: Depth = Field(default=64, description="held-out sequences")
    levels: Depth = Field(default=32, description="mask levels per sequence for the bound of `masked`, evenly spread")
    batch_size: Depth = Field(default=16, description="sequences per evaluation batch")
    num_samples: Depth = Field(default=2, description="texts generated at each depth, or images of each class")
    sample_length: Depth = Field(default=64, description="tokens per generated text")
    prompt_length: Depth = Field(default=16, description="held-out tokens that a generated text continues")
    difficulties: tuple[Count, ...] = Field(
        default=(), description="difficulties of a task to evaluate; empty: the task's own")
    num_problems: Depth = Field(
        default=256,
        description="held-out problems per difficulty; of a file each at most once, so that a larger number means all")
    trajectories: Depth = Field(
        default=1,
        description="trajectories per answer: runs of a denoiser's solver from other noise, or of a loop from other "
                    "random starts or with other noise along the path")
    choose: Annotated[str, named_or_path(tuple(CHOICES))] = Field(
        default="mean",
        description=f"choice among several trajectories: "
                    f"{'; '.join(f'{name}, {told}' for name, told in CHOICES.items())}; or the dotted path of a custom "
                    f"one")
    state_noise: NonNegative = Field(
        default=0.0,
        description="standard deviation of the normal noise added to a loop's state before each step when solving "
                    "problems, in units of the RMS of each row of the state; 0 adds none")
    num_images: Depth | None = Field(
        default=None, description="images generated at each depth for comparison with the held-out ones; null: as many")
