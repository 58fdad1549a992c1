"""Peak memory of a call: measured right, and shown."""

import torch

from bench import report
from bench.peak import peak_bytes

MIB = 2**20


def test_peak_of_a_known_call():
    """exp writes 64 MiB, and its gradient as much; Linux counts a few pages late."""
    x = torch.zeros(16 * MIB)
    assert 63 * MIB <= peak_bytes(torch.exp, "forward", (x,)) <= 68 * MIB
    assert 127 * MIB <= peak_bytes(torch.exp, "both", (x,)) <= 132 * MIB


def test_report_shows_it_where_it_was_measured():
    info = {
        "direction": "forward",
        "median_seconds": {"vfmk": 1.0, "eager": 2.0, "copy": 0.1},
        "share_of_copy": 0.1,
        "flop_per_second": 1e12,
    }
    measured = info | {"peak_bytes": {"vfmk": 3 * MIB, "eager": 2000 * MIB, "copy": MIB}}
    table = report.table(
        [{"group": "a", "extra_info": measured}, {"group": "b", "extra_info": info}]
    ).splitlines()
    assert table[0].endswith("| peak memory, MiB |")
    assert table[2].endswith("| vfmk 3, eager 2,000 |")
    assert table[3].endswith("|  |")
    assert "memory" not in report.table([{"group": "b", "extra_info": info}])
