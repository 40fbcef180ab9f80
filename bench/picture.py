"""Draws the README's picture: memory and time of a distillation step over the length of the sequence.

    python -m bench.picture docs/long_sequences/long_sequences.json docs/step.png

The figures are those that `python -m bench.long_sequences` measured; nothing is measured here.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from bench.report import write_atomically

# name in the file, name in the picture, line style, colour
WAYS = (
    ("usual", "attention scores stored", "o-", "#d1495b"),
    ("fastdistill", "fastdistill", "o-", "#00798c"),
    ("models alone", "the two models, without losses", "--", "#777777"),
)
# label, key in the file, its unit, how the values at the longest common length are written
PANELS = (
    ("memory of a training step, GiB", "extra_bytes", 2**30, "{:.1f} GiB"),
    ("time of a training step, seconds", "seconds", 1, "{:.1f} s"),
)


def draw(result: dict[str, Any], path: Path) -> None:
    """Writes the picture of a result of `bench.long_sequences` to `path`."""
    from matplotlib.figure import Figure

    lengths = result["lengths"]
    common = [i for i, x in enumerate(lengths) if "seconds" in x["ways"]["usual"]][-1]
    figure = Figure(figsize=(9, 3.3), layout="constrained")
    for axes, (label, key, unit, text) in zip(figure.subplots(1, 2), PANELS, strict=True):
        for name, title, style, colour in WAYS:
            measured = [x for x in lengths if "seconds" in x["ways"][name]]
            points = [(x["length"], x["ways"][name][key] / unit) for x in measured]
            axes.plot(*zip(*points, strict=True), style, color=colour, label=title, linewidth=2)
            if name != "models alone":
                value = text.format(points[common][1])
                axes.annotate(value, points[common], (-8, 4), textcoords="offset points", ha="right", color=colour)
        top = 1.12 * axes.get_ylim()[1]
        for x in lengths[common + 1 :]:
            reason = x["ways"]["usual"]["status"].replace(": ", ":\n").replace("would take", "needs")
            axes.text(x["length"], 0.93 * top, reason, color=WAYS[0][3], ha="right", va="top", fontsize="small")
        axes.set(xlabel="tokens in the sequence", title=label, ylim=(0, top))
        axes.set_xticks([x["length"] for x in lengths][1:])
        axes.title.set_fontsize("medium")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    figure.axes[1].legend(frameon=False, fontsize="small", loc="lower right", bbox_to_anchor=(1.02, 0.34))
    figure.savefig(path, format="png", dpi=100)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    write_atomically(target, partial(draw, json.loads(source.read_text(encoding="utf-8"))))
