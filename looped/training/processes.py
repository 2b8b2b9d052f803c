"""Processes of a run: the accelerator, work that the first process does for all, and the signals that stop training."""

import atexit
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from looped.config import Config
from looped.errors import UserError
from looped.precision import Precision, training_device
from looped.training.launcher_env import MIXED_PRECISION, check_launcher


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
    from accelerate.utils import GradientAccumulationPlugin

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
    accelerator = Accelerator(
        mixed_precision=MIXED_PRECISION[precision.dtype], kwargs_handlers=[unused], dynamo_backend="no",
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


def first_process(accelerator: Any, work: Callable[[], Any]) -> Any:
    """Result of `work()` on the first process, None on the others. All raise its UserError, so that none waits."""
    value, problem = None, [None]
    if accelerator.is_main_process:
        try:
            value = work()
        except UserError as error:
            problem = [str(error)]
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(problem)
    if problem[0]:
        raise UserError(problem[0])
    return value


def every_process(accelerator: Any, work: Callable[[], Any]) -> Any:
    """Result of `work()`, run on the first process and then on the others, which find its caches."""
    value = first_process(accelerator, work)
    return value if accelerator.is_main_process else work()


GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables by which a launcher describes the process group."""


def leave_group(num_blocks: int) -> int:
    """Detach this process from its launcher's group, with the device of its local rank, and return its rank.

    Raises UserError if no launcher has started it, or if more processes were started than there are blocks.
    """
    told = {name: os.environ.pop(name) for name in GROUP if name in os.environ}
    if "RANK" not in told:
        raise UserError("--block rank takes the block from a launcher's rank, and no launcher has set one; start it "
                        "with torchrun or accelerate launch, or give the number of a block")
    if int(told["WORLD_SIZE"]) > num_blocks:
        raise UserError(f"{told['WORLD_SIZE']} processes were started for blocks.num {num_blocks} blocks; start no "
                        f"more than {num_blocks}")
    import torch

    if torch.cuda.is_available() and not os.environ.get("ACCELERATE_USE_CPU"):
        os.environ["ACCELERATE_TORCH_DEVICE"] = f"cuda:{told.get('LOCAL_RANK', 0)}"
    return int(told["RANK"])


@dataclass
class Caught:
    """The last signal that arrived; 0: none."""

    number: int = 0


@contextmanager
def catch_signals() -> Iterator[Caught]:
    """Record SIGTERM and Ctrl-C instead of exiting; a second signal of the same kind acts as usual."""
    caught = Caught()
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread alone
        yield caught
        return
    usual = {}

    def handle(number, frame):
        caught.number = number
        signal.signal(number, usual[number])
        os.write(2, b"\nfinishing the step, then saving; a second signal stops at once\n")  # print is not re-entrant

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            usual[number] = signal.signal(number, handle)
        yield caught
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
