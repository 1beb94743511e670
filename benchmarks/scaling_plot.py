"""Draws what scaling.py has measured and predicts. Needs matplotlib."""

import math

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import scaling_model
import scaling_report
from matplotlib.lines import Line2D

# The same file for the same numbers.
matplotlib.rcParams["svg.hashsalt"] = "keras_allreduce"
matplotlib.rcParams["svg.fonttype"] = "none"
matplotlib.rcParams["font.size"] = 9

STYLES = {
    scaling_report.PROCESS: (":", "^"),
    scaling_report.LOOPBACK: ("-", "o"),
    scaling_report.WIRE: ("--", "s"),
}
SIZES = {2**16: "tab:green", 2**20: "tab:blue", 2**24: "tab:red"}
RATE_COLORS = ("tab:red", "tab:blue", "tab:green")


def draw(path, times, models, latencies, args) -> None:
    """Writes one SVG: what was measured, then a panel per latency."""
    # Two panels a row: as wide as a page of the documents.
    rows = math.ceil((1 + len(latencies)) / 2)
    figure, grid = plt.subplots(rows, 2, figsize=(7.6, 4.0 * rows))
    axes = grid.flatten()
    for axis in axes[1 + len(latencies) :]:
        axis.remove()
    _draw_costs(axes[0], times, models)
    panels = axes[1 : 1 + len(latencies)]
    for axis, (title, alpha) in zip(panels, latencies.items(), strict=True):
        _draw_efficiency(axis, title, alpha, models.inside, args)
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)


def _draw_costs(axis, times, models) -> None:
    for place, (dashes, marker) in STYLES.items():
        for nbytes, color in SIZES.items():
            measured = {
                setting: seconds * 1e3
                for (setting, size), seconds in times.items()
                if setting.place == place
                and size == nbytes
                # Of workers with one device each, or devices of one worker.
                and 1 in (setting.workers, setting.devices)
            }
            counts = [setting.replicas for setting in measured]
            axis.plot(counts, [*measured.values()], marker, color=color)
            model = [
                models.seconds(setting, nbytes, True) * 1e3
                for setting in measured
            ]
            axis.plot(counts, model, dashes, color=color, linewidth=1)
    axis.set(
        title=f"Cost of an all-reduce ({models.cores} cores)",
        xlabel="replicas",
        ylabel="ms (points: measured, lines: model)",
        xscale="log",
        yscale="log",
    )
    axis.set_xticks([2, 3, 4, 8], ["2", "3", "4", "8"])
    axis.minorticks_off()
    handles = [
        Line2D(
            [], [], color="gray", linestyle=dashes, marker=marker, label=place
        )
        for place, (dashes, marker) in STYLES.items()
    ]
    handles += [
        Line2D([], [], color=color, label=scaling_report.size(nbytes))
        for nbytes, color in SIZES.items()
    ]
    _legend_below(axis, handles)


def _draw_efficiency(axis, title, alpha, inside, args) -> None:
    compute = args.compute_ms / 1e3
    ways = {
        "ring": ("-", 1, False),
        f"{args.devices} a machine": ("--", args.devices, False),
        f"{args.devices} a machine, best packs": (":", args.devices, True),
    }
    for rate, color in zip(
        scaling_report.RATES.values(), RATE_COLORS, strict=True
    ):
        link = scaling_model.Link(alpha, rate, inside.gamma)
        for dashes, devices, best in ways.values():
            shares = []
            for workers in scaling_report.WORKERS:
                waited, _ = scaling_report.exposed(
                    workers, link, inside, devices, args, best
                )
                shares.append(scaling_model.efficiency(compute, waited))
            axis.plot(
                scaling_report.WORKERS, shares, dashes, color=color, marker="."
            )
    axis.set(
        title=f"Predicted, {title}",
        xlabel="workers",
        ylabel="weak scaling efficiency",
        xscale="log",
        ylim=(0, 1.02),
    )
    axis.title.set_fontsize(8)
    axis.set_xticks(
        scaling_report.WORKERS, [str(count) for count in scaling_report.WORKERS]
    )
    axis.minorticks_off()
    handles = [
        Line2D([], [], color="gray", linestyle=dashes, label=name)
        for name, (dashes, _, _) in ways.items()
    ]
    handles += [
        Line2D([], [], color=color, label=name)
        for name, color in zip(scaling_report.RATES, RATE_COLORS, strict=True)
    ]
    _legend_below(axis, handles)


def _legend_below(axis, handles) -> None:
    """Below the axes, where it covers no data."""
    axis.legend(
        handles=handles,
        fontsize=7,
        ncols=3,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.14),
        frameon=False,
    )
