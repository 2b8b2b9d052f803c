"""Processes: the accelerator, work that the first process does for all of them, and the signals that stop one."""

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
from looped.training.launcher import MIXED_PRECISION, check_launcher


def start_accelerator(config: Config) -> Any:
    """Device, processes and precision; imported here, as `import looped` users may never train.

    What accelerate would read in the environment is given to it, so that the config alone decides; a launcher that asks
    for something else is refused by a UserError.

    Every training rule reaches all that it trains in each step (a test says so), so DDP need not look for unused
    parameters; only those that train one block a step leave out the others, which then have no gradient anywhere.
    """
    import torch
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin

    check_launcher(config)
    if torch.distributed.is_available():
        # Its functions have the group there is when it is imported as a default, which would keep it alive when
        # `_leave` drops it; DDP imports it, and so it has to be there before there is a group.
        import torch.distributed.nn.functional

    AcceleratorState._reset_state()  # a process may train several configs, each with its own precision
    unused = DistributedDataParallelKwargs(find_unused_parameters=config.rule.trains_one_block(config))
    accelerator = Accelerator(
        mixed_precision=MIXED_PRECISION[config.training.precision], kwargs_handlers=[unused], dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1))  # the trainer splits its steps itself
    if config.training.threads:  # accelerate chooses some of its own for processes on a CPU
        torch.set_num_threads(config.training.threads)
    if accelerator.num_processes > 1:
        atexit.register(_leave)
    return accelerator


def _leave() -> None:
    """Close the connections to the other processes and end the threads that serve them.

    Such a thread may still be dropping the tensors of the last exchange, for which it needs the interpreter; where that
    is gone by then, the process is aborted (https://github.com/pytorch/pytorch/pull/179291). The threads are waited for
    when the last who knows the group is gone, and wrapped models, which are in cycles, know it too.
    """
    import gc

    import torch

    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def first_process(accelerator: Any, work: Callable[[], Any]) -> Any:
    """`work()` on the first process, None on the others; its UserError is raised by all, so that none waits for it."""
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
    """`work()` on the first process, then on the others, which find its caches."""
    value = first_process(accelerator, work)
    return value if accelerator.is_main_process else work()


GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher tells a process of its group."""


def leave_group(num_blocks: int) -> int:
    """The rank of this process of a launcher, which from then on is on its own, on the device of its local rank.

    Raises UserError where no launcher has started it, or where it has started more processes than there are blocks.
    """
    told = {name: os.environ.pop(name) for name in GROUP if name in os.environ}
    if "RANK" not in told:
        raise UserError("--block rank takes the block from the rank that a launcher gives, and there is none; start it "
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
    """Take note of SIGTERM and Ctrl-C instead of dying; the second signal of a kind acts as usual."""
    caught = Caught()
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread alone
        yield caught
        return
    usual = {}

    def handle(number, frame):
        caught.number = number
        signal.signal(number, usual[number])
        os.write(2, b"\nfinishing the step, then saving; once more stops at once\n")  # print is not re-entrant

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            usual[number] = signal.signal(number, handle)
        yield caught
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
