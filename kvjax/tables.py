"""What `kvjax compare` writes: a table for the terminal, Markdown, CSV and a picture."""

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvjax.compare import Row

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666", "#8A6D00")  # colour-blind safe
MARKERS = "osD^vPX*"


def header(rows: Sequence["Row"]) -> list[str]:
    """Names of the columns, with units."""
    kinds = list(rows[0].scores)
    return [
        "method",
        "budget",
        "MiB/context",
        "of full",
        *kinds,
        "KL [nats]",
        "top-1",
        "prefill [tok/s]",
        "decode [tok/s]",
    ]


def cells(row: "Row") -> list[str]:
    """One line of the table, as text."""
    return [
        row.method,
        str(row.budget),
        f"{row.bytes / 2**20:.2f}",
        f"{row.share:.1%}",
        *(f"{score:.0%}" for score in row.scores.values()),
        f"{row.kl:.3f}",
        f"{row.top1:.1%}",
        f"{row.prefill_speed:.0f}",
        f"{row.decode_speed:.0f}",
    ]


def markdown(rows: Sequence["Row"]) -> str:
    """The table in Markdown."""
    names = header(rows)
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *(cells(row) for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def comma_separated(rows: Sequence["Row"]) -> str:
    """The figures with all their digits, for further use."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = ["method", "policy", "budget", "bytes_per_context", "share_of_full"]
    names += [f"score_{kind}" for kind in rows[0].scores]
    names += ["score_mean", "kl_nats", "top1_agreement", "prefill_tokens_per_second", "decode_tokens_per_second"]
    writer.writerow(names)
    for row in rows:
        figures = [row.method, row.policy.name, row.budget, row.bytes, row.share, *row.scores.values(), row.score]
        writer.writerow([*figures, row.kl, row.top1, row.prefill_speed, row.decode_speed])
    return out.getvalue()


def picture(rows: Sequence["Row"], title: str) -> bytes:
    """Score and KL against bytes, a line for each method, as PNG.

    Raises:
      ModuleNotFoundError: If matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    full, *others = rows
    methods = list(dict.fromkeys(row.method for row in others))
    for panel, value, level in ((panels[0], lambda row: row.score, full.score), (panels[1], lambda row: row.kl, None)):
        for i, method in enumerate(methods):
            line = sorted((row.bytes / 2**20, value(row)) for row in others if row.method == method)
            panel.plot(*zip(*line, strict=True), marker=MARKERS[i % len(MARKERS)], color=COLOURS[i % len(COLOURS)],
                       label=method, linewidth=1.8, markersize=6)  # fmt: skip
        if level is not None:
            panel.axhline(level, color="black", linewidth=1, linestyle="--", label="full cache")
            panel.plot(full.bytes / 2**20, level, marker="o", color="black", linestyle="none")
        panel.set_xscale("log", base=2)
        ticks = sorted(
            {round(row.bytes / 2**20, 1) for row in rows if row.method in ("full", methods[0] if methods else "")}
        )
        panel.set_xticks(ticks)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel("bytes of the cache of one context [MiB]")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("hidden facts found")
    panels[0].set_ylim(-0.03, 1.03)
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    panels[1].set_ylabel("KL(full || compressed) on prose [nats]")
    if others and min(row.kl for row in others) > 0:
        panels[1].set_yscale("log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.suptitle(title, fontsize=9)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    plt.close(figure)
    return out.getvalue()
