"""Tables and plots of benchmark results: `python -m bench.report [FILE …]`.

Reads what pytest-benchmark or bench/gpu.py wrote, by default everything in bench/results, prints
Markdown, and draws the speed-ups beside each file that it read. Cases with the same peers share a
table of times, one of peak memory where that was measured, and a plot.
"""

import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
NOT_COMPARED = ("copy",)

Entry = dict[str, Any]


def load(path: Path) -> list[Entry]:
    """The measured cases of one file."""
    return [entry for entry in json.loads(path.read_text())["benchmarks"] if entry["extra_info"]]


def contenders(entry: Entry) -> list[str]:
    """Ours first."""
    return [name for name in entry["extra_info"]["median_seconds"] if name not in NOT_COMPARED]


def by_contenders(entries: list[Entry]) -> list[list[Entry]]:
    """Those with the same contenders together, in the order of their first."""
    order = list(dict.fromkeys(tuple(contenders(entry)) for entry in entries))
    entries = sorted(entries, key=lambda entry: order.index(tuple(contenders(entry))))
    return [list(group) for _, group in groupby(entries, contenders)]


def table(entries: list[Entry]) -> str:
    """Markdown: a row a case, ours in milliseconds, each peer as a multiple of ours."""
    ours, *peers = contenders(entries[0])
    header = [f"{ours}, ms", *(f"{peer} ÷ {ours}" for peer in peers), f"copy ÷ {ours}", "TFLOP/s"]
    rows = []
    for entry in entries:
        info = entry["extra_info"]
        medians = info["median_seconds"]
        multiples = [ratio(medians[peer], medians[ours]) for peer in peers]
        share, rate = f"{info['share_of_copy']:.2f}", f"{info['flop_per_second'] / 1e12:.2f}"
        rows.append([f"{medians[ours] * 1e3:.3f}", *multiples, share, rate])
    return markdown(entries, header, rows)


def memory_table(entries: list[Entry]) -> str:
    """The same of peak memory, in MiB, for the cases where it was measured; "" for none."""
    entries = [entry for entry in entries if "peak_bytes" in entry["extra_info"]]
    if not entries:
        return ""
    ours, *peers = contenders(entries[0])
    rows = []
    for entry in entries:
        peaks = entry["extra_info"]["peak_bytes"]
        multiples = [ratio(peaks[p], peaks[ours]) if p in peaks else "" for p in peers]
        rows.append([f"{peaks[ours] / 2**20:,.0f}", *multiples])
    return markdown(entries, [f"{ours}, peak MiB", *(f"{p} ÷ {ours}" for p in peers)], rows)


def markdown(entries: list[Entry], header: list[str], rows: list[list[str]]) -> str:
    cases = [[entry["group"], entry["extra_info"]["direction"]] for entry in entries]
    lines = [["case", "direction", *header], ["---"] * (2 + len(header))]
    lines += [case + row for case, row in zip(cases, rows, strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ratio(theirs: float, ours: float) -> str:
    """To three digits."""
    return f"{theirs / ours:#.3g}".rstrip(".")


def plot(entries: list[Entry], path: Path) -> None:
    """Bars: how many times faster than each peer; a chart for each set of contenders."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = by_contenders(entries)
    heights = [0.8 + 0.11 * len(group) * len(contenders(group[0])) for group in groups]
    figure, charts = pyplot.subplots(
        len(groups),
        figsize=(9, sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for group, axes in zip(groups, charts[:, 0], strict=True):
        draw(group, axes)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def draw(entries: list[Entry], axes: Any) -> None:
    ours, *peers = contenders(entries[0])
    labels = [f"{entry['group']}\n{entry['extra_info']['direction']}" for entry in entries]
    height = 0.8 / len(peers)
    for offset, peer in enumerate(peers):
        medians = [entry["extra_info"]["median_seconds"] for entry in entries]
        positions = [i + offset * height for i in range(len(entries))]
        axes.barh(positions, [m[peer] / m[ours] for m in medians], height, label=peer)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(entries))], labels, fontsize=6)
    axes.set_xscale("log")
    axes.set_xlabel(f"time of the peer ÷ time of {ours}", fontsize=7)
    axes.tick_params(axis="x", which="both", labelsize=6)
    axes.invert_yaxis()
    axes.legend(fontsize=6)


def main(paths: list[str]) -> None:
    files = [Path(path) for path in paths] or sorted(RESULTS.glob("*.json"))
    if not files:
        sys.exit(f"bench.report: no results in {RESULTS}, and no file named")
    for file in files:
        entries = load(file)
        print(f"\n### {file.stem}: {entries[0]['extra_info']['device']}")
        for group in by_contenders(entries):
            print(f"\n{table(group)}")
            if memory := memory_table(group):
                print(f"\n{memory}")
        plot(entries, file.with_suffix(".png"))


if __name__ == "__main__":
    main(sys.argv[1:])
