"""A search that is killed, by SIGKILL and at any moment, goes on where it ended."""

import json
import os
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from tests.channels.conftest import CHANNELS
from vfmk.channels import search

TOP_N = 4
SETS = 1 + CHANNELS * (CHANNELS - 1) + 2**TOP_N - 1 - TOP_N  # the frozen model, pairs, subsets
MOMENT = int(os.environ.get("VFMK_KILL_AFTER", "0"))  # lines written; any, if not given

WORKER = f"""
import json, sys, time
import torch.distributed as dist
from tests.channels.conftest import build_sam, build_samples
from vfmk.channels import scorers, search
from vfmk.channels.records import Records

folder, rank, processes, seconds = sys.argv[1], *map(float, sys.argv[2:])
if processes > 1:
    store = dist.FileStore(f"{{folder}}/store-{{seconds}}", int(processes))
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=int(processes))
scorers.CPU_BYTES = 1  # one set of pairs at a time
add = Records.add

def slowly(self, scores):
    time.sleep(seconds)
    add(self, scores)

Records.add = slowly
output = f"{{folder}}/scores.jsonl"
found = search(build_sam(), build_samples(3), top_n={TOP_N}, output=output, progress=False)
result = [found.best.pairs, found.best_score, found.passes]
open(f"{{folder}}/result-{{int(rank)}}.json", "w").write(json.dumps(result))
"""


def start(folder, processes, seconds):
    """Each waits `seconds` before it writes scores down."""
    return [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, *map(str, (folder, rank, processes, seconds))],
            env={**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(processes)
    ]


def written(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="module")
def result(sam, samples):
    return search(sam, samples, top_n=TOP_N, progress=False)


@pytest.mark.parametrize("processes", [1, 2])
def test_goes_on_and_recomputes_nothing(sam, samples, result, tmp_path, processes):
    output, moment = tmp_path / "scores.jsonl", MOMENT or random.randrange(1, SETS - 50)
    print(f"killed after {moment} lines; VFMK_KILL_AFTER={moment} does it again")
    workers = start(tmp_path, processes, 0.02)
    try:
        while written(output) < moment and all(worker.poll() is None for worker in workers):
            time.sleep(0.001)
        with pytest.raises(ValueError, match="is being written by another run"):
            search(sam, samples, top_n=TOP_N, output=output, progress=False)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    known = written(output)
    assert moment <= known < SETS

    if processes == 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the last line was cut, if it was
            again = search(sam, samples, top_n=TOP_N, output=output, progress=False)
        torch.testing.assert_close(again.singles, result.singles, rtol=0, atol=1e-6)
        results = [[again.best.pairs, again.best_score, again.passes]]
    else:
        assert [worker.wait() for worker in start(tmp_path, processes, 0)] == [0, 0]
        results = [json.loads(path.read_text()) for path in tmp_path.glob("result-*.json")]
    assert len(results) == processes
    for pairs, score, passes in results:
        assert tuple(map(tuple, pairs)) == result.best.pairs
        assert score == pytest.approx(result.best_score, abs=1e-6)
        assert passes == (SETS - known) * len(samples)
    lines = [json.loads(line) for line in output.read_bytes().splitlines()]
    assert len({json.dumps(line["pairs"]) for line in lines}) == len(lines) == SETS
