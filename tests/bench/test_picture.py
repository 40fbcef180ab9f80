"""Checks that the README's picture shows the figures of the committed result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="it draws the picture")

from matplotlib.figure import Figure

from bench import picture

ROOT = Path(__file__).parents[2]


def test_the_picture_shows_every_measured_point_and_marks_skipped_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k)))
    result = json.loads((ROOT / "docs/long_sequences/long_sequences.json").read_text())
    picture.draw(result, tmp_path / "step.png")
    (figure,) = drawn
    for axes, key, unit in zip(figure.axes, ("extra_bytes", "seconds"), (2**30, 1), strict=True):
        found = {line.get_label(): [tuple(point) for point in line.get_xydata()] for line in axes.lines}
        for name, title, *_ in picture.WAYS:
            ways = [(x["length"], x["ways"][name]) for x in result["lengths"]]
            assert found[title] == [(length, way[key] / unit) for length, way in ways if way["status"] == "ok"]
        assert any("not run" in text.get_text() for text in axes.texts)
    assert (tmp_path / "step.png").stat().st_size < 100_000
