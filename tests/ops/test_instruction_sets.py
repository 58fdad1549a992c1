"""The CPU kernels that this machine would not choose, by some cases of each operator's own tests.

The library chooses once for a process, so each set is tested in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vfmk
from vfmk import _backends

ROOT = Path(__file__).parents[2]
CASES = [  # lengths that no vector divides, and both float formats
    f"tests/ops/test_{operator}.py::test_equals_float64[cpu-{case}-torch.{dtype}]"
    for operator, case in (
        ("adapter_attention", "several chunks of queries"),
        ("adapter_attention", "odd heads"),
        ("attention_pool", "several chunks of tokens"),
        ("attention_pool", "ragged"),
        ("channel_remap", "planes-one map-contiguous"),
        ("channel_remap", "tokens-map for each sample-contiguous"),
        ("dynamic_conv2d", "k3-contiguous"),
        ("dynamic_conv2d", "rectangular-contiguous"),
        ("dynamic_depthwise_conv2d", "k3-contiguous"),
        ("dynamic_depthwise_conv2d", "rectangular-contiguous"),
        ("layer_norm_2d", "planes-contiguous"),
        ("layer_norm_2d", "tokens-channels_last"),
        ("rel_pos_attention", "window-packed"),
        ("rel_pos_attention", "ragged-packed"),
        ("rel_pos_attention", "odd head width-dense"),
        ("window_rel_pos_attention", "padded below and right"),
        ("window_rel_pos_attention", "oblong windows"),
    )
    for dtype in ("float32", "bfloat16")
]
CASES += [
    f"tests/ops/test_mask_iou.py::test_equals_sam[cpu-noise-{case}]"
    for case in ("tiny", "tiny, reduced", "one column")
]
CASES += [
    f"tests/ops/test_channel_remap.py::test_{case}"
    for case in (
        "few_channels_exchanged[cpu-channels_last]",
        "few_channels_exchanged_and_some_cut_or_added[cpu-61-channels_last]",
        "few_channels_exchanged_and_some_cut_or_added[cpu-70-channels_last]",
        "larger_than_the_caches[torch.float32-two exchanged-channels_last]",
        "larger_than_the_caches[torch.bfloat16-permutation-channels_last]",
        "larger_than_the_caches[torch.bfloat16-permutation-contiguous]",
    )
]
SCRIPT = """
import sys
import pytest
import vfmk
from vfmk import _backends

instruction_set, *arguments = sys.argv[1:]
assert not vfmk.backends()["mask_iou"]["cpu"]  # loads the library
assert _backends.build_info().startswith(f"cpu: {instruction_set};"), _backends.build_info()
sys.exit(pytest.main(arguments))
"""


@pytest.mark.parametrize("instruction_set", ["avx2", "baseline"])
def test_every_operator(instruction_set):
    if reason := vfmk.backends()["mask_iou"]["cpu"]:
        pytest.skip(reason)
    if instruction_set == "avx2" and "cpu: baseline" in _backends.build_info():
        pytest.skip("this machine has no AVX2")
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT, instruction_set, "-q", "-p", "no:cacheprovider", *CASES],
        cwd=ROOT,
        env=os.environ | {"VFMK_CPU_ISA": instruction_set},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"{len(CASES)} passed" in finished.stdout, finished.stdout
