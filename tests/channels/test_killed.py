"""A search that is killed, by SIGKILL and at any moment, goes on where it ended."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.channels.conftest import build_samples
from vfmk.channels import search

OPTIONS = {
    "exhaustive": {"top_n": 4},
    "screened": {"top_n": 4, "strategy": "screened", "keep": 0.2},
}
SAMPLES = {"exhaustive": 3, "screened": 8}
PROCESSES = 2
MOMENT = int(os.environ.get("VFMK_KILL_AFTER", "0"))  # lines written; any, if not given

WORKER = """
import json, sys, time
import torch.distributed as dist
from tests.channels.conftest import build_sam, build_samples
from tests.channels.test_killed import OPTIONS, PROCESSES, SAMPLES
from vfmk.channels import scorers, search
from vfmk.channels.records import Records

folder, strategy = sys.argv[1:3]
rank, seconds = map(float, sys.argv[3:])
store = dist.FileStore(f"{folder}/store-{seconds}", PROCESSES)
dist.init_process_group("gloo", store=store, rank=int(rank), world_size=PROCESSES)
scorers.CPU_BYTES = 1  # one set of pairs at a time
write = Records._write

def slowly(self, lines):
    time.sleep(seconds)
    write(self, lines)

Records._write = slowly
output = f"{folder}/scores.jsonl"
samples = build_samples(SAMPLES[strategy])
found = search(build_sam(), samples, output=output, progress=False, **OPTIONS[strategy])
result = [found.best.pairs, found.best_score, found.passes]
open(f"{folder}/result-{int(rank)}.json", "w").write(json.dumps(result))
"""


def start(folder, strategy, seconds):
    """Each waits `seconds` before it writes scores down."""
    return [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, *map(str, (folder, strategy, rank, seconds))],
            env={**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(PROCESSES)
    ]


def written(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def lines_of(path):
    """Without one that was cut."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


@pytest.mark.parametrize("strategy", ["exhaustive", "screened"])
def test_goes_on_and_recomputes_nothing(sam, tmp_path, strategy):
    samples, options = build_samples(SAMPLES[strategy]), OPTIONS[strategy]
    result = search(sam, samples, output=tmp_path / "reference", progress=False, **options)
    expected = lines_of(tmp_path / "reference")
    output = tmp_path / "scores.jsonl"
    moment = MOMENT or random.randrange(1, len(expected) * 4 // 5)
    print(f"killed after {moment} lines; VFMK_KILL_AFTER={moment} does it again")
    workers = start(tmp_path, strategy, 0.1 if strategy == "screened" else 0.02)
    try:
        while written(output) < moment and all(worker.poll() is None for worker in workers):
            time.sleep(0.001)
        with pytest.raises(ValueError, match="is being written by another run"):
            search(sam, samples, output=output, progress=False, **options)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    known = lines_of(output)
    assert moment <= len(known) < len(expected)

    workers = start(tmp_path, strategy, 0)
    assert [worker.wait() for worker in workers] == [0] * PROCESSES
    results = [json.loads(path.read_text()) for path in tmp_path.glob("result-*.json")]
    assert len(results) == PROCESSES
    once_more = 4 * len(samples) if strategy == "screened" else 0  # gradients, the frozen model
    for pairs, score, passes in results:
        assert tuple(map(tuple, pairs)) == result.best.pairs
        assert score == pytest.approx(result.best_score, abs=1e-6)
        assert passes == samples_of(expected) - samples_of(known) + once_more
    assert sets_of(lines_of(output)) == sets_of(expected)


def samples_of(lines):
    return sum(line["samples"] for line in lines)


def sets_of(lines):
    return sorted((line["pairs"], line["samples"]) for line in lines)
