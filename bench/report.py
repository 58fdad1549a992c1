"""Tables and plots of benchmark results: `python -m bench.report [FILE …]`.

Reads what pytest-benchmark or bench/gpu.py wrote, by default everything in bench/results, prints
Markdown, and draws the speed-ups beside each file that it read.
"""

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PEERS_NOT_COMPARED = ("copy",)


def load(path: Path) -> list[dict[str, Any]]:
    """The measured cases of one file."""
    return [entry for entry in json.loads(path.read_text())["benchmarks"] if entry["extra_info"]]


def table(entries: list[dict[str, Any]]) -> str:
    """Markdown: a row a case, ours in milliseconds, each peer as a multiple of ours."""
    peers = list(dict.fromkeys(p for e in entries for p in e["extra_info"]["median_seconds"]))
    ours, *peers = (p for p in peers if p not in PEERS_NOT_COMPARED)
    header = ["case", "direction", f"{ours}, ms", *(f"{p} ÷ {ours}" for p in peers)]
    header += [f"copy ÷ {ours}", "TFLOP/s"]
    with_memory = any("peak_bytes" in entry["extra_info"] for entry in entries)
    if with_memory:
        header.append("peak memory, MiB")
    rows = [header, ["---"] * len(header)]
    for entry in entries:
        info = entry["extra_info"]
        medians = info["median_seconds"]
        relative = (f"{medians[p] / medians[ours]:.2f}" if p in medians else "" for p in peers)
        rows.append(
            [
                entry["group"],
                info["direction"],
                f"{medians[ours] * 1e3:.3f}",
                *relative,
                f"{info['share_of_copy']:.2f}",
                f"{info['flop_per_second'] / 1e12:.2f}",
                *([memory(info.get("peak_bytes", {}))] if with_memory else []),
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def memory(peak_bytes: dict[str, int]) -> str:
    """Of each contender, above what stood before the call."""
    return ", ".join(
        f"{name} {size / 2**20:,.0f}"
        for name, size in peak_bytes.items()
        if name not in PEERS_NOT_COMPARED
    )


def plot(entries: list[dict[str, Any]], path: Path) -> None:
    """Bars: how many times faster than each peer, a group a case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = [f"{e['group']}\n{e['extra_info']['direction']}" for e in entries]
    names = list(dict.fromkeys(p for e in entries for p in e["extra_info"]["median_seconds"]))
    ours, *peers = (name for name in names if name not in PEERS_NOT_COMPARED)
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.45 * len(entries)), layout="constrained")
    height = 0.8 / len(peers)
    for offset, peer in enumerate(peers):
        medians = [entry["extra_info"]["median_seconds"] for entry in entries]
        speedups = [m[peer] / m[ours] if peer in m else 0 for m in medians]
        positions = [i + offset * height for i in range(len(entries))]
        axes.barh(positions, speedups, height, label=peer)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(entries))], labels, fontsize=6)
    axes.set_xscale("log")
    axes.set_xlabel(f"time of the peer ÷ time of {ours}")
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(paths: list[str]) -> None:
    files = [Path(path) for path in paths] or sorted(RESULTS.glob("*.json"))
    if not files:
        sys.exit(f"bench.report: no results in {RESULTS}, and no file named")
    for file in files:
        entries = load(file)
        print(f"\n### {file.stem}: {entries[0]['extra_info']['device']}\n\n{table(entries)}")
        plot(entries, file.with_suffix(".png"))


if __name__ == "__main__":
    main(sys.argv[1:])
