"""Draws a timeline as a picture, for documents. Needs matplotlib.

    python benchmarks/timeline_plot.py timeline.json docs/timeline.svg

Any viewer of Chrome traces shows more; this draws what a page has room for.
"""

import argparse
import json
from collections.abc import Sequence

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

# The same file for the same timeline.
matplotlib.rcParams["svg.hashsalt"] = "keras_allreduce"
matplotlib.rcParams["svg.fonttype"] = "none"
matplotlib.rcParams["font.size"] = 9

COLORS = {
    "wait for input": "#d9d9d9",
    "forward and backprop": "#74a9cf",
    "wait for another replica": "#fdd49e",
    "wait for another worker": "#fc8d59",
    "all-reduce, exposed": "#d7301f",
    "update": "#78c679",
    "step": "#bdbdbd",
    "pack in flight": "#9e9ac8",
}


def kind_of(event: dict) -> str:
    """The entry of `COLORS` that a slice belongs to."""
    name = event["name"]
    if name.startswith("wait for replica"):
        return "wait for another replica"
    if name.startswith("wait for worker"):
        return "wait for another worker"
    if name.startswith("pack "):
        return "pack in flight"
    return "step" if name.startswith("step ") else name


def rows_of(events: Sequence[dict]) -> dict[tuple[int, int], str]:
    """The rows in the order of the viewer, with their names."""
    workers = {event["pid"] for event in events}
    named = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event["name"] == "thread_name"
    }
    return {
        row: name if len(workers) == 1 else f"worker {row[0]}: {name}"
        for row, name in sorted(named.items())
    }


def draw(events: Sequence[dict], steps: Sequence[int], path: str) -> None:
    """Draws all slices of some steps.

    Args:
        events: The events of a trace.
        steps: First step and the one after the last.
        path: The SVG file.
    """
    slices = [event for event in events if event["ph"] == "X"]
    names = {f"step {number}" for number in range(*steps)}
    shown = [
        event
        for event in slices
        if event["name"] in names or event["args"].get("step") in range(*steps)
    ]
    used = {(event["pid"], event["tid"]) for event in shown}
    rows = {row: name for row, name in rows_of(events).items() if row in used}
    start = min(event["ts"] for event in shown)
    figure, axis = plt.subplots(figsize=(9.5, 0.8 + 0.42 * len(rows)))
    for event in shown:
        place = len(rows) - 1 - list(rows).index((event["pid"], event["tid"]))
        begin, length = (event["ts"] - start) / 1e3, event["dur"] / 1e3
        kind = kind_of(event)
        # What is inside another slice of its row is drawn lower.
        inside = kind == "wait for another worker" and event["tid"] >= 1000
        axis.barh(
            place,
            length,
            left=begin,
            height=0.4 if inside else 0.8,
            color=COLORS[kind],
            edgecolor="white",
            linewidth=0.4,
        )
        if kind == "step":
            axis.text(
                begin + length / 2,
                place,
                event["name"],
                ha="center",
                va="center",
            )
    axis.set_yticks(range(len(rows)), list(rows.values())[::-1])
    axis.set_xlabel("ms")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(left=False)
    kinds = {kind_of(event) for event in shown} - {"step"}
    axis.legend(
        handles=[
            Patch(color=color, label=kind)
            for kind, color in COLORS.items()
            if kind in kinds
        ],
        ncols=4,
        loc="lower center",
        bbox_to_anchor=(0.45, 1.0),
        frameon=False,
    )
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("timeline", help="what AllReduceTimeline has written")
    parser.add_argument("picture", help="the SVG file to write")
    parser.add_argument(
        "--steps", type=int, nargs=2, default=(26, 28), metavar=("FIRST", "END")
    )
    args = parser.parse_args()
    with open(args.timeline, encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    draw(events, args.steps, args.picture)


if __name__ == "__main__":
    main()
