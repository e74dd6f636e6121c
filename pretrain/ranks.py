"""Join the ranks of a run, whether the `deepspeed` launcher started them or this is a single process."""

import logging
import os
import socket
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from boldforge.configs import BoldForgeError

Result = TypeVar("Result")


def accelerator_ready() -> None:
    """Tell DeepSpeed to run on the CPU where there is no GPU; must come before `import deepspeed`."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def join_ranks() -> tuple[int, int]:
    """Initialise the process group and the device of this rank.

    Returns
    -------
    tuple of int
        Rank and world size.
    """
    accelerator_ready()
    import deepspeed

    # On a CPU it would compile an op that only inference calls: that takes a minute, and a compilation that is killed
    # leaves a lock on which every later launch waits without a word.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(_free_port())
    deepspeed.init_distributed(verbose=False)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    elif "OMP_NUM_THREADS" not in os.environ:
        local_ranks = int(os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"]))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def on_first_rank(action: Callable[[], Result]) -> Result:
    """Do something on rank 0 alone; called by every rank, each of which gets what came out.

    Raises
    ------
    BoldForgeError
        On every rank what rank 0 refused: one that waited for it would end in a traceback of its own.
    """
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = action()
        except BoldForgeError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise BoldForgeError(box[1])
    return cast(Result, box[0])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
