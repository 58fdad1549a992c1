"""Peak memory of a call: measured right, and shown."""

from functools import partial

import torch

from bench import report
from bench.harness import calls
from bench.peak import peak_bytes

MIB = 2**20


def test_peak_of_a_known_call():
    """exp of 64 MiB writes as much, and so does its gradient; Linux counts a few pages late."""
    x = torch.zeros(16 * MIB)
    forward = partial(calls, torch.exp, "forward", [(x,)])
    assert 63 * MIB <= peak_bytes(forward) <= 68 * MIB
    assert 127 * MIB <= peak_bytes(partial(calls, torch.exp, "both", [(x,)])) <= 132 * MIB
    assert 127 * MIB <= peak_bytes(forward, standing=True) <= 132 * MIB


def test_report_shows_it_where_it_was_measured():
    info = {
        "direction": "forward",
        "median_seconds": {"vfmk": 1.0, "eager": 2.0, "copy": 0.1},
        "share_of_copy": 0.1,
        "flop_per_second": 1e12,
    }
    measured = info | {"peak_bytes": {"vfmk": 3 * MIB, "eager": 2000 * MIB, "copy": MIB}}
    entries = [{"group": "a", "extra_info": measured}, {"group": "b", "extra_info": info}]
    table = report.memory_table(entries).splitlines()
    assert table[0].endswith("| vfmk, peak MiB | eager ÷ vfmk |")
    assert table[2:] == ["| a | forward | 3 | 667 |"]
    assert report.memory_table(entries[1:]) == ""


def test_report_has_a_table_for_each_set_of_peers():
    def entry(group, **medians):
        return {"group": group, "extra_info": {"median_seconds": {**medians, "copy": 0.1}}}

    entries = [entry("a", vfmk=1, eager=2), entry("b", vfmk=1, sdpa=2), entry("c", vfmk=1, eager=3)]
    groups = [[e["group"] for e in group] for group in report.by_contenders(entries)]
    assert groups == [["a", "c"], ["b"]]
