"""Processes of a run: the accelerator, work that the first process does for all, and what all must agree on."""

import atexit
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from looped.config import Config
from looped.errors import UserError
from looped.evaluation.workers import ALONE, SeveralWorkers, Workers
from looped.precision import Precision, training_device
from looped.training.heartbeat import Watch, watched
from looped.training.launcher_env import MIXED_PRECISION, check_launcher
from looped.training.resume_rules import differences
from looped.training.runs import versions


def start_accelerator(config: Config) -> Any:
    """Create the accelerator: device, processes and precision. It is imported here, since many users never train.

    Settings that accelerate would read from the environment are passed explicitly, so that the config alone decides; a
    launcher that contradicts the config raises a UserError.

    Every training rule uses all its trained parameters in each step (tested), so DDP need not look for unused ones.
    Only rules that train one block per step leave the other blocks without gradient, on all processes alike.
    """
    import torch
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

    check_launcher(config)
    device = training_device()
    precision = Precision.of(config, device)
    precision.check(device)
    if torch.distributed.is_available():
        # Its functions take the process group at import time as a default, which would keep the group alive after
        # `_leave`. DDP imports this module, so it is imported here, before there is a group.
        import torch.distributed.nn.functional

    AcceleratorState._reset_state()  # a process may train several configs, each with its own precision
    unused = DistributedDataParallelKwargs(find_unused_parameters=config.rule.trains_one_block(config))
    limit = InitProcessGroupKwargs(timeout=timedelta(seconds=max(1800, 10 * config.training.lost_after)))
    accelerator = Accelerator(
        cpu=device.type == "cpu", mixed_precision=MIXED_PRECISION[precision.dtype], kwargs_handlers=[unused, limit],
        dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1))  # the trainer splits its steps itself
    if config.training.threads:  # accelerate chooses some of its own for processes on a CPU
        torch.set_num_threads(config.training.threads)
    if accelerator.num_processes > 1:
        atexit.register(_leave)
    return accelerator


def check_attention(config: Config, accelerator: Any) -> None:
    """Raise UserError if `model.attention` cannot train on this device in this precision."""
    from looped.nn.backends import reason_not

    name = config.model.attention
    if name != "auto" and (reason := reason_not(name, **_attention_of(config, accelerator))):
        raise UserError(f"model.attention {name} cannot train here: {reason}; set it to auto")


def first_backend(config: Config, accelerator: Any) -> str:
    """The attention backend that training begins with; warns if `auto` has to do without xformers on CUDA."""
    from looped.nn.attention import choose_backend

    return choose_backend(config.model.attention, **_attention_of(config, accelerator))


def _attention_of(config: Config, accelerator: Any) -> dict[str, Any]:
    """Causal attention in training, as the choice of a backend needs it."""
    import torch

    from looped.nn.masks import Causal

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
    return {"mask": Causal(), "device": accelerator.device, "dtype": dtype, "head_dim": config.model.head_width,
            "needs_gradient": True}


def _leave() -> None:
    """Close the connections to the other processes and end the threads that serve them.

    Such a thread may still be freeing the tensors of the last exchange, for which it needs the interpreter; if that is
    gone by then, the process aborts (https://github.com/pytorch/pytorch/pull/179291). The threads are joined when the
    last reference to the group is gone; wrapped models, which are in reference cycles, hold such references.
    """
    import gc

    import torch

    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Processes:
    """The processes of a run, of which the first works for all where one is enough."""

    def __init__(self, accelerator: Any, watch: Watch | None):
        self.accelerator = accelerator
        self.watch = watch

    @property
    def is_first(self) -> bool:
        return self.accelerator.is_main_process

    def first(self, work: Callable[[], Any]) -> Any:
        """Result of `work()` on the first process, None on the others, which wait for it without an exchange that could
        run out of time. All raise its UserError."""
        return work() if self.watch is None else self.watch.first(work)

    def shared(self, work: Callable[[], Any]) -> Any:
        """Result of `work()` on the first process, given to all."""
        return self.gather([self.first(work)])[0]

    def every(self, work: Callable[[], Any]) -> Any:
        """Result of `work()`, run on the first process and then on the others, which find its caches."""
        value = self.first(work)
        return value if self.is_first else work()

    def by_first(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, called on all processes, of which the first runs it (`first`)."""
        return lambda *arguments: self.first(lambda: function(*arguments))

    def together(self, work: Callable[[], Any]) -> list[Any]:
        """Results of `work()` of all processes, by rank. They wait for each other without an exchange that could run
        out of time, and all raise a UserError of any."""
        return self.gather([work() if self.watch is None else self.watch.every(work)])

    @property
    def workers(self) -> Workers:
        """The processes as those that divide an evaluation."""
        rank, num = self.accelerator.process_index, self.accelerator.num_processes
        return ALONE if self.watch is None else SeveralWorkers(rank, num, self.together)

    def gather(self, values: list[Any]) -> list[Any]:
        """The lists of all processes, joined."""
        if self.watch is None:
            return values
        from accelerate.utils import gather_object

        return gather_object(values)

    def check_same(self, facts: Mapping[str, Any], remedy: str) -> None:
        """Raise UserError on every process, naming the first fact of another that is not the first process's."""
        ours, *others = self.gather([facts])
        for rank, theirs in enumerate(others, start=1):
            for change in differences(ours, theirs):
                raise UserError(f"rank {rank} has {change.setting} {change.new}, and rank 0 has {change.old}; {remedy}")


@contextmanager
def processes_of(config: Config) -> Iterator[Processes]:
    """Start the accelerator, watch the processes inside the block, and check that all have the same config and
    versions."""
    accelerator = start_accelerator(config)
    with watched(accelerator, config.training.lost_after) as watch:
        processes = Processes(accelerator, watch)
        processes.check_same(config.model_dump(mode="json") | {"version": versions()},
                             "start all processes with the same command and the same packages")
        yield processes


GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables by which a launcher describes the process group."""


def several() -> bool:
    """True if a launcher has started several processes for this run."""
    _join_step()
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _join_step() -> None:
    """Describe the processes that `srun` has started as a group, which torchrun and accelerate do by themselves."""
    told = os.environ
    if "RANK" in told or int(told.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    group = {"RANK": told["SLURM_PROCID"], "LOCAL_RANK": told["SLURM_LOCALID"],
             "WORLD_SIZE": told["SLURM_STEP_NUM_TASKS"],
             "MASTER_ADDR": told.get("MASTER_ADDR") or _first_host(told),
             "MASTER_PORT": told.get("MASTER_PORT") or str(20000 + int(told["SLURM_JOB_ID"]) % 10000)}
    os.environ.update(group)


def _first_host(told: Mapping[str, str]) -> str:
    """The node of the first process of a SLURM step."""
    if told.get("SLURM_STEP_NUM_NODES", "1") == "1":
        return "127.0.0.1"
    try:
        shown = subprocess.run(["scontrol", "show", "hostnames", told["SLURM_STEP_NODELIST"]], capture_output=True,
                               text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise UserError("srun has started processes on several nodes, and scontrol cannot name the first of them; set "
                        "MASTER_ADDR to its address") from None
    return shown.stdout.split()[0]


def leave_group(num_blocks: int) -> int:
    """Detach this process from its launcher's group, with the device of its local rank, and return its rank.

    Raises UserError if no launcher has started it, or if more processes were started than there are blocks.
    """
    _join_step()
    told = {name: os.environ.pop(name) for name in GROUP if name in os.environ}
    if "RANK" not in told:
        raise UserError("--block rank takes the block from a launcher's rank, and no launcher has set one; start it "
                        "with torchrun, srun or accelerate launch, or give the number of a block")
    if int(told["WORLD_SIZE"]) > num_blocks:
        raise UserError(f"{told['WORLD_SIZE']} processes were started for blocks.num {num_blocks} blocks; start no "
                        f"more than {num_blocks}")
    import torch

    if torch.cuda.is_available() and not os.environ.get("ACCELERATE_USE_CPU"):
        os.environ["ACCELERATE_TORCH_DEVICE"] = f"cuda:{told.get('LOCAL_RANK', 0)}"
    return int(told["RANK"])
