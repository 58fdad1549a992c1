"""Several processes that find each other as torchrun's do, without torchrun's long start."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

TIMEOUT = 120  # seconds, after which they hang

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(  # imported once for all of them
    [
        "accelerate",
        "peft",
        "torchmetrics.detection",
        "segment_anything",
        "tests.train.test_processes",
        "vfmk.tasks.detection",
        "vfmk.tasks.promptable",
        "vfmk.tasks.semantic",
    ]
)


def in_each(function: Callable[..., Any], arguments: list[tuple]) -> list[Any]:
    """What `function` returned or raised in each process, or its exit code if it was killed: then
    the others are killed too, as a launcher does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started, pipes = [], []
    for rank, own in enumerate(arguments):
        pipe, end = processes.Pipe(duplex=False)
        process = processes.Process(
            target=_begin, args=(rank, len(arguments), port, end, function, own)
        )
        process.start()
        end.close()
        started.append(process)
        pipes.append(pipe)
    outcomes: list[Any] = ["hangs"] * len(started)
    waiting = list(range(len(started)))
    # A killed one's own workers may keep its pipe open for seconds: hence the sentinels.
    while waiting and wait([w for r in waiting for w in (pipes[r], started[r].sentinel)], TIMEOUT):
        for rank in list(waiting):
            has_ended = not started[rank].is_alive()  # asked first: what it sent is there by now
            try:
                if pipes[rank].poll():
                    outcomes[rank] = pipes[rank].recv()
                elif has_ended:
                    raise EOFError
                else:
                    continue
            except EOFError:
                for process in started:
                    process.kill()
                started[rank].join()
                outcomes[rank] = started[rank].exitcode
            waiting.remove(rank)
    for process in started:
        process.kill()
        process.join()
    return outcomes


def _begin(
    rank: int, count: int, port: int, pipe: Connection, function: Callable[..., Any], own: tuple
) -> None:
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the workers that load images
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {name: str(value) for name, value in places.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # gloo, on any machine
    try:
        outcome = function(*own)
    except Exception as error:
        outcome = error
    pipe.send(outcome)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
