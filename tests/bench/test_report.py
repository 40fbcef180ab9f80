"""Checks pages and comparisons of results that are written by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench import report

pytest.importorskip("matplotlib", reason="it draws the plots")
from matplotlib.figure import Figure
from matplotlib.image import imread

KIND = "bfloat16, forward + backward"


def record(length: int, implementation: str, seconds: float | None = None, **changes) -> dict:
    """Makes a record of attention_mse; if `seconds` is given, with quartiles 2% off and 4 MiB of extra memory."""
    made = {
        "op": "attention_mse", "shape": f"1 x 12 heads x {length}, d 26 / 64", "dtype": "bfloat16",
        "sizes": {"batch": 1, "heads": 12, "length": length, "student_dim": 26, "teacher_dim": 64},
        "direction": "forward + backward", "implementation": implementation, "status": "ok",
        "least_bytes": 2e6, "least_flops": 5e8, "floor_seconds": 1e-3,
    }  # fmt: skip
    if seconds is not None:
        made |= {"seconds": seconds, "low": seconds * 0.98, "high": seconds * 1.02, "rounds": 7}
        made |= {"extra_bytes": 4 * 2**20, "error": 2e-3, "error_limit": 2e-2}
    return made | changes


def of_op(made: dict, op: str, shape: str, **sizes: int) -> dict:
    return made | {"op": op, "shape": shape, "sizes": sizes}


RECORDS = [
    record(2048, "fastdistill triton", 4e-3, error=3.1e-2, extra_bytes=0),  # fast, but red
    record(2048, "fastdistill torch", 16e-3),
    record(2048, "eager", 344e-3, extra_bytes=763 * 2**20),
    record(2048, "torch.compile", 1e-3, error=float("nan")),
    record(2048, "liger-kernel jsd", status="failed: CompilationError: at 4:2\n  `x` | y"),
    record(4096, "fastdistill triton", 8e-3),
    record(4096, "fastdistill torch", 32e-3),
    record(4096, "eager", status="out of memory"),
    record(4096, "torch.compile", 776e-3),
    record(4096, "liger-kernel jsd", status="failed: CompilationError: at 4:2\n  `x` | y"),
    *(
        of_op(
            record(0, name, seconds * classes, least_flops=0), "kl_div", f"64 rows, V {classes}", rows=64,
            vocabulary=classes,
        )
        for classes in (8192, 30522)
        for name, seconds in (("fastdistill triton", 1e-7), ("eager", 5e-7))
    ),
    *(
        of_op(
            record(0, name, seconds, least_flops=None, least_bytes=None, floor_seconds=None),
            "causal LM step", f"{batch} x {length} tokens", batch=batch, length=length, tokens=1024,
        ) | {"direction": "training step"}
        for batch, length in ((8, 128), (2, 512))
        for name, seconds in (("fastdistill", 0.25), ("usual", 0.5))
    ),
]  # fmt: skip


def run(records: list[dict], **changes) -> dict:
    return {
        "format": 1, "device": "NVIDIA H200", "card": "H200", "driver": "575.1", "commit": "071e301", "modified": True,
        "versions": {"fastdistill": "0.1.0", "triton": None}, "date": "2026-11-21T08:30:00Z", "preset": "quick",
        "threads": 2, "command": "python -m pytest bench", "records": records,
        "peers": {"liger-kernel": "0.8.5", "fla-core": "missing: pip install fla-core"},
    } | changes  # fmt: skip


def written(path: Path, result: dict) -> str:
    path.write_text(json.dumps(result))
    return str(path)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_a_good_file_is_read_as_it_is(tmp_path: Path) -> None:
    records = [made for made in RECORDS if made.get("error") == 2e-3]
    result = run(records)
    assert report.read(written(tmp_path / "a.json", result)) == result
    assert report.key(records[0]) == (
        "attention_mse", "1 x 12 heads x 2048, d 26 / 64", "bfloat16", "forward + backward", "fastdistill torch",
    )  # fmt: skip


GOOD = record(2048, "eager", 1.0)


@pytest.mark.parametrize(
    "result,message",
    [
        ([], "format is [], expected 1"),
        (run([], format=2), "format is 2, expected 1"),
        ({name: value for name, value in run([]).items() if name != "driver"}, "driver is missing"),
        (run([], threads="2"), "threads is '2', expected int"),
        (run([], threads=True), "threads is True, expected int"),
        (run([], card="H2000"), "card is 'H2000', expected null or one of H200"),
        (run([], versions={"torch": 2}), "versions: torch is 2, expected str | None"),
        (run([3]), "record 0: is 3, expected an object"),
        (run([{**GOOD, "sizes": {"length": 2.5}}]), "record 0: sizes: length is 2.5, expected int"),
        (run([GOOD, record(4096, "eager")]), "record 1: seconds is missing"),
        (run([{**GOOD, "extra_bytes": None}]), "record 0: extra_bytes is None, expected int | float"),
        (run([{**GOOD, "extra_bytes": -1}]), "extra_bytes is -1, expected 0 or more"),
        (run([{**GOOD, "seconds": 0}]), "seconds is 0, expected a positive number"),
        (run([{**GOOD, "low": 2.0}]), "low is 2.0, expected at most high, 1.02"),
        (run([GOOD, record(4096, "eager", 1.0), GOOD]), "record 2: is the same measurement as record 0: attention_mse"),
    ],
)
def test_a_bad_file_is_refused_with_its_fault(tmp_path: Path, result: dict, message: str) -> None:
    path = written(tmp_path / "bad.json", result)
    with pytest.raises(ValueError, match="bad.json: .*" + re.escape(message)):
        report.read(path)


# ---------------------------------------------------------------------------------------------------------------------
# Pages


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Figure]]:
    """Renders RECORDS, one of them from a second file; returns the folder, the page and the figures by file name."""
    folder = tmp_path_factory.mktemp("render")
    figures: dict[str, Figure] = {}
    save = Figure.savefig

    def kept(figure: Figure, path: Path, **options) -> None:
        figures[re.sub(r"^\.|\.\d+$", "", path.name)] = figure
        save(figure, path, **options)

    before = [RECORDS[0], record(2048, "fastdistill torch", 999.0), *RECORDS[2:]]
    (folder / "later").mkdir()
    paths = [
        written(folder / "first.json", run(before)),
        written(folder / "later" / "first.json", run([RECORDS[1]], card=None, commit="e16e004", modified=False)),
        written(folder / "cpu.json", run(RECORDS, device="Some CPU, 2 cores", card=None, driver=None)),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", kept)
        assert report.main(["render", *paths[:2], "--out", str(folder / "docs")]) == 0
    assert report.main(["render", paths[2], "--out", str(folder / "docs")]) == 0
    page = folder / "docs" / "benchmarks" / "nvidia-h200.md"
    return page.parent, page.read_text(), figures


def rows(page: str, op: str) -> list[list[str]]:
    """Returns the cells of an op's tables, with the shapes filled in."""
    section = page.split(f"## {op}\n")[1].split("\n## ")[0]
    found: list[list[str]] = []
    for line in section.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            found.append([cells[0] or found[-1][0], *cells[1:]])
    return found


def test_the_header_says_how_it_was_measured(rendered) -> None:
    _, page, _ = rendered
    for fact in (
        "# Benchmarks: NVIDIA H200", "`first.json`", "device: NVIDIA H200, driver 575.1",
        "fastdistill 0.1.0; triton none", "preset: quick",
        "liger-kernel 0.8.5; fla-core missing: pip install fla-core", "commit: 071e301 with changes\n",
        "commit: e16e004\n", "date: 2026-11-21T08:30:00Z", "threads: 2", "`python -m pytest bench`",
        "records: 18, 1 of them replaced by a later run", "records: 1\n",
    ):  # fmt: skip
        assert fact in page, fact


def test_tables_hold_every_figure_and_no_ratio_of_a_red_record(rendered) -> None:
    _, page, _ = rendered
    short, long = (f"1 x 12 heads x {length}, d 26 / 64" for length in (2048, 4096))
    assert rows(page, "attention_mse") == [
        ["shape", "implementation", "time", "of ours", "extra MiB"],
        ["---", "---", "---:", "---:", "---:"],
        [short, "fastdistill triton", "red (error 3.1e-02)", "", "0"],
        [short, "fastdistill torch", "16 ms", "1x", "4"],
        [short, "eager", "344 ms", "21.5x", "763"],
        [short, "torch.compile", "red (error nan)", "", "4"],
        [short, "liger-kernel jsd", "failed", "", ""],
        [long, "fastdistill triton", "8 ms", "1x", "4"],
        [long, "fastdistill torch", "32 ms", "4x", "4"],
        [long, "eager", "out of memory", "", ""],
        [long, "torch.compile", "776 ms", "97x", "4"],
        [long, "liger-kernel jsd", "failed", "", ""],
        ["shape", "ours", "GB/s", "GFLOP/s", "of floor", "error"],
        ["---", "---", "---:", "---:", "---:", "---:"],
        [short, "fastdistill triton", "", "", "", "3.1e-02"],
        [short, "fastdistill torch", "0.125", "31.2", "6%", "2.0e-03"],
        [long, "fastdistill triton", "0.25", "62.5", "12%", "2.0e-03"],
        [long, "fastdistill torch", "0.0625", "15.6", "3%", "2.0e-03"],
    ]
    assert rows(page, "causal LM step")[2:6] == [
        ["8 x 128 tokens", "fastdistill", "250 ms", "1x", "4", "4096"],
        ["8 x 128 tokens", "usual", "500 ms", "2x", "4", "2048"],
        ["2 x 512 tokens", "fastdistill", "250 ms", "1x", "4", "4096"],
        ["2 x 512 tokens", "usual", "500 ms", "2x", "4", "2048"],
    ]
    assert ["64 rows, V 30522", "fastdistill triton", "0.655", "33%", "2.0e-03"] in rows(page, "kl_div")
    assert f"### {KIND}\n" in page


def test_records_without_a_time_are_listed_in_full(rendered) -> None:
    _, page, _ = rendered
    assert "- liger-kernel jsd, every shape: `failed: CompilationError: at 4:2 'x' | y`\n" in page
    assert "- eager, 1 x 12 heads x 4096, d 26 / 64: `out of memory`\n" in page


def test_lines_of_tables_fit_100_columns(rendered) -> None:
    _, page, _ = rendered
    assert max(len(line) for line in page.splitlines() if line.startswith("|")) <= 100


def test_plots_are_linked_pictures(rendered) -> None:
    folder, page, _ = rendered
    links = re.findall(r"!\[.*\]\((.*)\)", page)
    assert links == [
        f"nvidia-h200/{name}.png"
        for name in (
            "attention-mse-bfloat16-forward-backward", "kl-div-bfloat16-forward-backward",
            "causal-lm-step-bfloat16-training-step", "roofline",
        )
    ]  # fmt: skip
    assert sorted(path.name for path in folder.iterdir()) == [
        "nvidia-h200", "nvidia-h200.md", "some-cpu-2-cores", "some-cpu-2-cores.md"
    ]  # fmt: skip
    for link in links:
        assert (folder / link).read_bytes().startswith(b"\x89PNG")
        picture = imread(folder / link)
        assert picture.shape[0] > 300
        assert len({tuple(pixel) for pixel in picture[::3, ::3].reshape(-1, picture.shape[2])}) > 5
    assert len(list((folder / "nvidia-h200").iterdir())) == len(links)


def points(figure: Figure, panel: int) -> list[tuple[float, float]]:
    markers = [line for line in figure.axes[panel].lines if line.get_marker() != "None"]
    return sorted((float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in markers)


def test_plots_show_the_measured_records_that_are_not_red(rendered) -> None:
    *_, figures = rendered
    attention = figures["attention-mse-bfloat16-forward-backward.png"]
    expected = [(2048, 16), (2048, 344), (4096, 8), (4096, 32), (4096, 776)]
    assert points(attention, 0) == [(x, pytest.approx(y)) for x, y in expected]
    assert points(attention, 1) == [(2048, 4), (2048, 763), (4096, 4), (4096, 4), (4096, 4)]
    assert [axes.get_ylabel() for axes in attention.axes] == ["time, ms", "extra memory, MiB"]
    assert {axes.get_xscale() + axes.get_yscale() for axes in attention.axes} == {"loglog"}
    step = figures["causal-lm-step-bfloat16-training-step.png"]
    assert points(step, 0) == [(128, 2048), (128, 4096), (512, 2048), (512, 4096)]
    assert [axes.get_xlabel() for axes in step.axes] == ["length", "length"]
    logits = figures["kl-div-bfloat16-forward-backward.png"]
    assert [x for x, _ in points(logits, 0)] == [8192, 8192, 30522, 30522]
    assert [axes.get_xlabel() for axes in logits.axes] == ["vocabulary", "vocabulary"]


def test_the_roofline_has_our_fastest_good_backends_and_a_roof_if_the_card_is_known(rendered) -> None:
    folder, page, figures = rendered
    roofline = figures["roofline.png"]
    assert points(roofline, 0) == [(250, pytest.approx(31.25)), (250, pytest.approx(62.5))]
    assert [text.get_text() for text in roofline.axes[0].texts] == [
        "4.3 TB/s", "16 bits: 790 TFLOP/s", "float32, float64: 60 TFLOP/s"
    ]  # fmt: skip
    assert "no roof is drawn" not in page
    other = (folder / "some-cpu-2-cores.md").read_text()
    assert "no roof is drawn" in other
    assert (folder / "some-cpu-2-cores" / "roofline.png").exists()


def test_a_failed_render_leaves_files_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(figure: Figure, path: Path, **options) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    page = tmp_path / "benchmarks" / "nvidia-h200.md"
    page.parent.mkdir()
    page.write_text("as it was")
    path = written(tmp_path / "a.json", run(RECORDS))
    monkeypatch.setattr(Figure, "savefig", broken)
    with pytest.raises(OSError, match="disk full"):
        report.render([path], tmp_path)
    assert page.read_text() == "as it was"
    assert list((page.parent / "nvidia-h200").iterdir()) == []


def test_render_names_a_bad_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "bad.json", run([], format=3))
    assert report.main(["render", path, "--out", str(tmp_path / "docs")]) == 2
    assert capsys.readouterr().err == f"{path}: format is 3, expected 1\n"
    assert not (tmp_path / "docs").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Two runs


def compared(tmp_path: Path, capsys, old: list[dict], new: list[dict], *options: str, **changes) -> tuple[int, str]:
    paths = written(tmp_path / "old.json", run(old)), written(tmp_path / "new.json", run(new, **changes))
    code = report.main(["compare", *paths, *options])
    out = capsys.readouterr()
    return code, out.out + out.err


OURS, EAGER = record(2048, "fastdistill triton", 0.1), record(2048, "eager", 1.0)


def slower(made: dict, factor: float) -> dict:
    return made | {name: made[name] * factor for name in ("seconds", "low", "high")}


def line(text: str, implementation: str) -> str:
    return next(x for x in text.splitlines() if x.startswith(f"  {implementation} "))


def test_the_same_run_is_no_regression(tmp_path: Path, capsys) -> None:
    code, text = compared(tmp_path, capsys, RECORDS, RECORDS)
    assert code == 0
    assert "no regressions of fastdistill" in text
    assert not re.search("SLOWER|MEMORY|NEWLY|VANISHED|noise[?]|faster|set up", text)
    assert "+0.0%" in line(text, "eager")


@pytest.mark.parametrize(
    "new,mark,code",
    [
        ([slower(OURS, 1.2), EAGER], "SLOWER", 1),
        ([slower(OURS, 1.049), EAGER], "", 0),
        ([slower(OURS, 1.06), EAGER], "SLOWER", 1),
        ([OURS | {"extra_bytes": OURS["extra_bytes"] * 1.06}, EAGER], "MORE MEMORY", 1),
        ([slower(OURS, 0.8), EAGER], "faster", 0),
        ([slower(OURS, 1.2) | {"low": 0.1}, EAGER], "noise?", 0),
        ([OURS | {"extra_bytes": 5 * 2**20}, EAGER], "MORE MEMORY", 1),
        ([OURS | {"extra_bytes": 3 * 2**20}, EAGER], "less memory", 0),
        ([OURS | {"error": 0.5}, EAGER], "NEWLY RED", 1),
        ([OURS | {"error": float("nan")}, EAGER], "NEWLY RED", 1),
        ([record(2048, "fastdistill triton", status="out of memory"), EAGER], "NEWLY FAILING", 1),
        ([EAGER], "VANISHED", 1),
    ],
)
def test_changes_of_ours_are_marked_and_counted(tmp_path: Path, capsys, new, mark, code) -> None:
    """The same changes of a peer are marked too, but are not counted."""
    found, text = compared(tmp_path, capsys, [OURS, EAGER], new)
    assert found == code
    of_ours = line(text, "fastdistill triton")
    assert of_ours.endswith(mark) if mark else of_ours.endswith("%")
    assert (f"1 regression of fastdistill\n  {', '.join(report.key(OURS))}: {mark}" in text) == bool(code)

    def peer(made: dict) -> dict:
        return made if made == EAGER else made | {"implementation": "liger-kernel kl"}

    found, text = compared(tmp_path, capsys, [peer(OURS), EAGER], [peer(made) for made in new])
    assert found == 0
    assert line(text, "liger-kernel kl").endswith(mark)


def test_the_threshold_applies_to_time_and_memory(tmp_path: Path, capsys) -> None:
    new = [slower(OURS, 1.2) | {"extra_bytes": 5 * 2**20}]
    code, text = compared(tmp_path, capsys, [OURS], new, "--threshold", "0.3")
    assert (code, "SLOWER" in text, "MORE MEMORY" in text) == (0, False, False)
    code, text = compared(tmp_path, capsys, [OURS], new, "--threshold", "0.22")
    assert (code, "SLOWER" in text, "MORE MEMORY" in text) == (1, False, True)
    code, text = compared(tmp_path, capsys, [OURS], new, "--threshold", "-1")
    assert (code, text) == (2, "--threshold: got -1.0, expected 0 or more\n")


def test_memory_where_there_was_none_is_a_regression(tmp_path: Path, capsys) -> None:
    code, text = compared(tmp_path, capsys, [OURS | {"extra_bytes": 0}], [OURS])
    assert code == 1
    assert "MORE MEMORY" in text


def test_drift_is_shown_and_divided_out(tmp_path: Path, capsys) -> None:
    """Ours takes 1.5 times as long and the baseline 1.25 times, so ours is slower by a fifth."""
    peer = record(2048, "liger-kernel kl", 0.5)
    code, text = compared(
        tmp_path, capsys, [OURS, EAGER, peer], [slower(OURS, 1.5), slower(EAGER, 1.25), slower(peer, 1.05)]
    )
    assert code == 1
    assert "peers and baselines: median time x1.150 over 2 records" in text
    assert "fastdistill: median time x1.500 over 1 record\n" in text
    assert line(text, "fastdistill triton").split()[1:] == [
        "triton", "100", "ms", "150", "ms", "+50.0%", "4", "4", "+0.0%", "+20.0%", "SLOWER"
    ]  # fmt: skip
    assert line(text, "eager").split() == ["eager", "1", "s", "1.25", "s", "+25.0%", "4", "4", "+0.0%", "SLOWER"]


def test_red_records_enter_no_ratio(tmp_path: Path, capsys) -> None:
    red = EAGER | {"error": 0.5}
    code, text = compared(tmp_path, capsys, [OURS, red], [OURS, slower(red, 3)])
    assert code == 0
    assert re.split("  +", line(text, "eager")) == ["", "eager", *["red (error 5.0e-01)"] * 2, "4", "4", "still red"]
    assert "peers and baselines: nothing to compare" in text
    assert line(text, "fastdistill triton").split()[2:] == ["100", "ms", "100", "ms", "+0.0%", "4", "4", "+0.0%"]


def test_new_and_mended_records_are_no_regressions(tmp_path: Path, capsys) -> None:
    old = [record(2048, "fastdistill triton", status="needs a GPU")]
    code, text = compared(tmp_path, capsys, old, [OURS, EAGER], threads=4)
    assert code == 0
    assert line(text, "fastdistill triton").endswith("mended")
    assert "1 record is new" in text
    assert "  threads: 2 -> 4\n" in text


def test_files_that_cannot_be_compared_are_refused(tmp_path: Path, capsys) -> None:
    code, text = compared(tmp_path, capsys, [OURS], [OURS], device="NVIDIA A100")
    assert code == 2
    assert "new.json: device is 'NVIDIA A100', expected 'NVIDIA H200'" in text
    assert "different devices" in text
    good, broken = written(tmp_path / "good.json", run([OURS])), tmp_path / "broken.json"
    broken.write_text('{"format": 1, ')
    assert report.main(["compare", good, str(broken)]) == 2
    assert f"{broken}: is not JSON: " in capsys.readouterr().err
    assert report.main(["compare", str(tmp_path / "none.json"), good]) == 2
    assert "none.json: cannot be read: No such file" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# The end of a run


def test_the_summary_has_a_line_for_every_record() -> None:
    lines = report.summary(RECORDS).splitlines()
    assert max(map(len, lines)) <= 120
    assert len(lines) == 1 + len(RECORDS) + 6
    assert lines[1] == f"attention_mse, 1 x 12 heads x 2048, d 26 / 64, {KIND}"
    assert [x.split() for x in lines[2:7]] == [
        ["fastdistill", "triton", "red", "(error", "3.1e-02)", "0", "3.1e-02", "red"],
        ["fastdistill", "torch", "16", "ms", "1x", "4", "2.0e-03", "ok"],
        ["eager", "344", "ms", "21.5x", "763", "2.0e-03", "ok"],
        ["torch.compile", "red", "(error", "nan)", "4", "nan", "red"],
        ["liger-kernel", "jsd", "failed:", "CompilationError:", "at", "4:..."],
    ]
    assert report.summary([]) == "nothing was measured"


@pytest.mark.parametrize(
    "seconds,text",
    [
        (1.24, "1.24 s"),
        (0.99996, "1 s"),
        (0.0207, "20.7 ms"),
        (2.07e-5, "20.7 us"),
        (1234.5, "1234 s"),
        (4e-8, "0.04 us"),
    ],
)
def test_times_have_three_digits(seconds: float, text: str) -> None:
    assert report._seconds(seconds) == text
