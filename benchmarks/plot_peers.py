"""Draw docs/assets/speed.png of benchmarks/results/bench_ops_cpu.json: visattn against the fastest of the others.

python benchmarks/plot_peers.py  # after benchmarks/bench_ops.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "bench_ops_cpu.json"
PICTURE = ROOT / "docs" / "assets" / "speed.png"
CASES = {
    "na2d_56": "neighborhood, 7 x 7",
    "na2d_56_bias": "neighborhood, position table",
    "na2d_56_d8": "neighborhood, dilation 8",
    "window_56": "window",
    "grid_56": "grid",
    "halo_64_8heads": "halo",
    "routed_28_topk4": "bi-level routing",
    "aggregated_56": "aggregated",
    "agent_56_a9": "agent",
    "inline_56": "InLine",
    "focused_56": "focused linear",
    "efficient_56": "efficient",
}
MODES = {"forward": "tab:gray", "forward+backward": "tab:blue"}


def factors(record: dict[str, Any]) -> dict[str, dict[str, tuple[str, float]]]:
    """By case and mode, the fastest of the other providers and how many times faster visattn is."""
    found: dict[str, dict[str, tuple[str, float]]] = {case: {} for case in CASES}
    for case in CASES:
        for mode in MODES:
            times = {
                result["provider"]: result["median_ms"]
                for result in record["results"]
                if (result["case"], result["mode"]) == (case, mode) and result["median_ms"] is not None
            }
            ours = times.pop("visattn eager")
            peer = min(times, key=lambda name: times[name])
            found[case][mode] = peer, times[peer] / ours
    return found


def described(found: dict[str, dict[str, tuple[str, float]]]) -> str:
    """What the picture shows, in words: it is kept in the file."""
    cells = [(case, mode, *found[case][mode]) for case in found for mode in found[case]]
    return "; ".join(f"{case} {mode}: {factor:.2f} x {peer}" for case, mode, peer, factor in cells)


def draw(record: dict[str, Any], picture: Path) -> None:
    """Write the picture."""
    found = factors(record)
    figure, axis = plt.subplots(figsize=(11, 5.4))
    for shift, (mode, colour) in zip((-0.2, 0.2), MODES.items(), strict=True):
        values = [found[case][mode][1] for case in CASES]
        places = [place + shift for place in range(len(CASES))]
        bars = axis.barh(places, values, height=0.4, color=colour, label=mode.replace("+", " + "))
        axis.bar_label(bars, [f"{value:.1f}" for value in values], padding=3, fontsize=8)
    peers = {case: " / ".join(dict.fromkeys(peer for peer, _ in modes.values())) for case, modes in found.items()}
    axis.set_yticks(range(len(CASES)), [f"{title}\nagainst {peers[case]}" for case, title in CASES.items()], fontsize=8)
    axis.invert_yaxis()
    axis.set_xscale("log", base=2)
    axis.set_xticks([1, 2, 4, 8, 16], ["1 x", "2 x", "4 x", "8 x", "16 x"])
    axis.set_xlim(0.8, 20)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xlabel("times as fast as the fastest of the others, one CPU thread")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(picture, dpi=100, metadata={"Description": described(found)})
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=PICTURE)
    args = parser.parse_args(argv)
    draw(json.loads(args.results.read_text()), args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
