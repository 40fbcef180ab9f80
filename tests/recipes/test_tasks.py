"""Tests the GLUE tasks: readers on real and broken files, label order, metrics by hand."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

from fastdistill.recipes.glue import (  # noqa: E402
    TASKS,
    check_labels,
    compute_metrics,
    get_task,
    load_split,
    read_tsv,
    tokenize,
)

GLUE = Path(__file__).resolve().parents[3] / "shared" / "data" / "glue"
VOCAB = GLUE.parent / "vocab" / "bert-base-uncased-vocab.txt"
needs_glue = [
    pytest.mark.data,
    pytest.mark.skipif(not GLUE.is_dir(), reason="GLUE's files are not at ../shared/data/glue"),
]


def write(folder, name, text, encoding="utf-8"):
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


class TestTable:
    def test_nine_tasks_with_distinct_names(self):
        assert len(TASKS) == 9
        assert len({task.hub_name for task in TASKS}) == 9

    @pytest.mark.parametrize(
        ("name", "expected"),
        [("SST-2", "SST-2"), ("sst2", "SST-2"), ("sts-B", "STS-B"), ("mnli", "MNLI"), ("squad2", "SQuAD2")],
    )
    def test_case_and_hyphens_in_names_do_not_matter(self, name, expected):
        assert get_task(name).name == expected

    def test_an_unknown_name_lists_the_known_ones(self):
        known = r"CoLA, SST-2, .*WNLI, SQuAD, SQuAD2, tagging"
        with pytest.raises(ValueError, match=rf"task is 'snli'; it should be one of {known}"):
            get_task("snli")

    def test_lengths_and_recipe(self):
        # arXiv 1909.10351, section 4.2.
        assert {t.name for t in TASKS if t.max_length == 64} == {"CoLA", "SST-2"}
        assert {t.name: t.intermediate_epochs for t in TASKS if t.intermediate_epochs != 20} == {
            "CoLA": 50,
            "QQP": 10,
            "MNLI": 10,
            "QNLI": 10,
        }
        assert {t.name for t in TASKS if len(t.evaluations) == 2} == {"MNLI"}

    @pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
    def test_model_options_make_a_config(self, task):
        config = transformers.BertConfig(**task.model_options())
        assert config.num_labels == max(len(task.labels), 1)
        if not task.is_regression:
            assert [config.id2label[i] for i in range(config.num_labels)] == list(task.labels)
            assert config.label2id == {label: i for i, label in enumerate(task.labels)}
        check_labels(task, config)


class TestRealFiles:
    pytestmark = needs_glue

    @pytest.mark.parametrize(
        ("name", "split", "rows", "labels"),
        [
            ("SST-2", "train", 67349, [29780, 37569]),
            ("SST-2", "dev", 872, [428, 444]),
            ("CoLA", "train", 8551, [2528, 6023]),
            ("CoLA", "dev", 1043, [322, 721]),
            ("MRPC", "train", 3668, [1194, 2474]),
            ("MRPC", "dev", 408, [129, 279]),
            ("RTE", "train", 2490, [1249, 1241]),
            ("RTE", "dev", 277, [146, 131]),
            ("QNLI", "dev", 5463, [2702, 2761]),
            ("WNLI", "train", 635, [323, 312]),
            ("WNLI", "dev", 71, [40, 31]),
            ("STS-B", "train", 5749, None),
            ("STS-B", "dev", 1500, None),
        ],
    )
    def test_every_row_is_read(self, name, split, rows, labels):
        task = get_task(name)
        data = load_split(task, split, GLUE / name)
        assert data.num_rows == rows
        assert data.column_names == ["sentence1", "sentence2", "label"][: len(task.texts)] + ["label"]
        if labels is not None:
            assert np.bincount(data["label"]).tolist() == labels
        # Compare with a second reader that shares no code with ours.
        with (GLUE / name / f"{split}.tsv").open(encoding="utf-8-sig", newline="") as file:
            table = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        place = {"SST-2": [0], "CoLA": [3], "MRPC": [3, 4], "STS-B": [7, 8]}.get(name, [1, 2])
        table = table if name == "CoLA" else table[1:]
        for column, index in zip(["sentence1", "sentence2"], place, strict=False):
            assert data[column][:] == [row[index] for row in table]

    def test_scores_of_stsb(self):
        labels = np.array(load_split(get_task("STS-B"), "dev", GLUE / "STS-B")["label"])
        assert labels.dtype == np.float64
        assert labels[0] == 5.0
        assert (labels.min(), labels.max()) == (0.0, 5.0)


class TestReaders:
    def test_mnli_has_two_evaluations_of_its_own(self, tmp_path):
        columns = ["index", "sentence1", "sentence2", "label1", "gold_label"]
        for split, text in {"train": "t", "dev_matched": "m", "dev_mismatched": "mm"}.items():
            write(tmp_path, f"{split}.tsv", "\t".join(columns) + f"\n0\t{text}\tb\tneutral\tcontradiction\n")
        task = get_task("MNLI")
        for split, text in {"train": "t", "dev_matched": "m", "dev_mismatched": "mm"}.items():
            assert load_split(task, split, tmp_path)[0] == {"sentence1": text, "sentence2": "b", "label": 2}

    def test_qqp_drops_lines_that_are_cut_short(self, tmp_path, caplog):
        path = write(
            tmp_path,
            "train.tsv",
            "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
            "0\t1\t2\tHow far?\tHow long?\t0\n"
            "1\t3\t4\tcut short\n"
            "2\t5\t6\tWhy?\tWhy not?\t1\n",
        )
        data = read_tsv(get_task("QQP"), path)
        assert data["label"][:] == [0, 1]
        assert "skipped 1 lines" in caplog.text

    def test_qnli_reads_question_then_sentence(self, tmp_path):
        path = write(tmp_path, "dev.tsv", "index\tquestion\tsentence\tlabel\n0\tWho?\tHe.\tnot_entailment\n")
        assert read_tsv(get_task("QNLI"), path)[0] == {"sentence1": "Who?", "sentence2": "He.", "label": 1}

    def test_quotes_line_separators_and_carriage_returns(self, tmp_path):
        text = 'sentence\tlabel\r\n"open quote\t1\r\na\u2028b\x0bc\t0\r\n'
        path = write(tmp_path, "dev.tsv", text)
        assert read_tsv(get_task("SST-2"), path)["sentence1"][:] == ['"open quote', "a\u2028b\x0bc"]

    def test_byte_order_mark(self, tmp_path):
        path = write(tmp_path, "dev.tsv", "sentence\tlabel\nfine\t1\n", "utf-8-sig")
        assert read_tsv(get_task("SST-2"), path)["label"][:] == [1]

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("SST-2", "sentence\tlabel\ngood\t1\nbad\n", r"dev\.tsv:3: 1 columns; a line of SST-2 has 2"),
            ("SST-2", "sentence\tlabel\na\tb\t1\n", r"dev\.tsv:2: 3 columns"),
            ("SST-2", "sentence\tlabel\na\t2\n", r"dev\.tsv:2: label '2'; SST-2 has 0, 1"),
            ("SST-2", "sentence\tlabel\na\t\n", r"dev\.tsv:2: label ''"),
            ("SST-2", "sentence\tlabel\n", r"dev\.tsv: no rows"),
            ("SST-2", "", r"dev\.tsv: empty"),
            ("RTE", "sentence\tlabel\na\t1\n", r"no column 'sentence1', 'sentence2' in the header"),
            ("RTE", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n", r":2: label '1'; RTE has entailment"),
            ("CoLA", "gj04\t1\t\tFine.\ngj04\t0\tx\n", r"dev\.tsv:2: 3 columns; a line of CoLA has 4"),
            (
                "STS-B",
                "sentence1\tsentence2\tscore\na\tb\tnan\n",
                r":2: score 'nan'; STS-B has numbers",
            ),
            ("STS-B", "sentence1\tsentence2\tscore\na\tb\t5.1\n", r":2: score '5\.1'"),
        ],
    )
    def test_errors_name_the_malformed_line(self, tmp_path, name, text, message):
        path = write(tmp_path, "dev.tsv", text)
        with pytest.raises(ValueError, match=message):
            read_tsv(get_task(name), path)

    def test_a_file_that_is_not_utf8(self, tmp_path):
        path = write(tmp_path, "dev.tsv", "sentence\tlabel\né\t1\n", "latin-1")
        with pytest.raises(ValueError, match=r"not UTF-8 text \(byte 15\)"):
            read_tsv(get_task("SST-2"), path)

    def test_missing_files_folders_and_splits(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"train\.tsv: no such file; SST-2"):
            load_split(get_task("SST-2"), "train", tmp_path)
        with pytest.raises(FileNotFoundError, match="no such folder"):
            load_split(get_task("SST-2"), "train", tmp_path / "nowhere")
        with pytest.raises(ValueError, match="split is 'dev'; MNLI has train, dev_matched, dev_mismatched"):
            load_split(get_task("MNLI"), "dev", tmp_path)

    def test_hub_columns_get_the_same_names(self, monkeypatch):
        asked = []

        def fake(path, name, split):
            asked.append((path, name, split))
            return datasets.Dataset.from_dict(
                {"premise": ["p"], "hypothesis": ["h"], "label": [2], "idx": [0], "sentence": ["s"]}
            )

        monkeypatch.setattr(datasets, "load_dataset", fake)
        mnli = load_split(get_task("MNLI"), "dev_mismatched")
        assert mnli[0] == {"sentence1": "p", "sentence2": "h", "label": 2}
        assert load_split(get_task("SST-2"), "train")[0] == {"sentence1": "s", "label": 2}
        assert asked == [
            ("nyu-mll/glue", "mnli", "validation_mismatched"),
            ("nyu-mll/glue", "sst2", "train"),
        ]


class TestTokenize:
    pytestmark = needs_glue

    def tokenizer(self):
        return transformers.BertTokenizerFast(vocab_file=str(VOCAB))

    def test_pairs_are_cut_at_128_and_carry_segments(self):
        task = get_task("RTE")
        rows = datasets.Dataset.from_dict({"sentence1": ["the " * 300], "sentence2": ["a " * 9], "label": [1]})
        data = tokenize(task, rows, self.tokenizer())
        assert len(data[0]["input_ids"]) == 128
        assert sum(data[0]["token_type_ids"]) == 10
        assert data.column_names == ["labels", "input_ids", "token_type_ids", "attention_mask"]
        assert data.features["labels"].dtype == "int64"

    def test_single_sentences_are_cut_at_64_and_scores_stay_floats(self):
        rows = datasets.Dataset.from_dict({"sentence1": ["the " * 300], "label": [0]})
        assert len(tokenize(get_task("SST-2"), rows, self.tokenizer())[0]["input_ids"]) == 64
        assert len(tokenize(get_task("SST-2"), rows, self.tokenizer(), 16)[0]["input_ids"]) == 16
        rows = datasets.Dataset.from_dict({"sentence1": ["a"], "sentence2": ["b"], "label": [2.5]})
        assert tokenize(get_task("STS-B"), rows, self.tokenizer()).features["labels"].dtype == "float32"


class TestMetrics:
    def test_accuracy_and_f1_by_hand(self):
        # Predictions 1 1 0 1 0 for labels 1 0 0 1 1: 3 of 5 right; precision 2/3, recall 2/3.
        logits = np.array([[0, 1], [0, 1], [1, 0], [-1, 4], [1, 0]])
        labels = np.array([1, 0, 0, 1, 1])
        values = compute_metrics(get_task("MRPC"), logits, labels)
        assert values == pytest.approx({"accuracy": 0.6, "f1": 2 / 3, "score": (0.6 + 2 / 3) / 2})
        assert compute_metrics(get_task("RTE"), logits, labels) == pytest.approx({"accuracy": 0.6, "score": 0.6})
        # TP 2, TN 1, FP 1, FN 1: (2*1 - 1*1) / sqrt(3*3*2*2).
        assert compute_metrics(get_task("CoLA"), logits, labels)["matthews"] == pytest.approx(1 / 6)

    def test_mnli_takes_three_classes_only(self):
        assert compute_metrics(get_task("MNLI"), np.eye(3), np.arange(3))["accuracy"] == 1
        with pytest.raises(ValueError, match=r"shape \(3, 2\); MNLI needs \(rows, 3\)"):
            compute_metrics(get_task("MNLI"), np.eye(3)[:, :2], np.arange(3))

    def test_correlations_by_hand(self):
        labels = np.array([0.0, 1.0, 2.0, 3.0])
        logits = np.array([[0.0], [1.0], [4.0], [9.0]])
        values = compute_metrics(get_task("STS-B"), logits, labels)
        # Deviations -1.5 -0.5 0.5 1.5 and -3.5 -2.5 0.5 5.5: 15 / sqrt(5 * 49).
        assert values["pearson"] == pytest.approx(15 / math.sqrt(245))
        assert values["spearman"] == pytest.approx(1.0)
        assert values["score"] == pytest.approx((values["pearson"] + 1) / 2)

    def test_the_correlation_of_constant_predictions_is_zero(self):
        values = compute_metrics(get_task("STS-B"), np.full(4, 2.0), np.arange(4.0))
        assert values == {"pearson": 0.0, "spearman": 0.0, "score": 0.0}

    def test_the_correlation_of_nan_and_inf_is_zero(self):
        for wrong in (np.nan, np.inf):
            values = compute_metrics(get_task("STS-B"), np.array([1.0, 2.0, wrong, 3.0]), np.arange(4.0))
            assert values == {"pearson": 0.0, "spearman": 0.0, "score": 0.0}

    def test_lengths_must_match(self):
        with pytest.raises(ValueError, match=r"labels have shape \(3,\); predictions"):
            compute_metrics(get_task("RTE"), np.eye(2), np.zeros(3))


class TestLabelOrder:
    def test_another_order_is_refused(self):
        labels = ["contradiction", "entailment", "neutral"]
        config = transformers.BertConfig(num_labels=3, id2label=dict(enumerate(labels)))
        with pytest.raises(ValueError, match=r"\['contradiction', 'entailment', 'neutral'\]; MNLI here has"):
            check_labels(get_task("MNLI"), config)

    def test_case_and_hyphens_do_not_matter(self):
        config = transformers.BertConfig(num_labels=2, id2label={0: "ENTAILMENT", 1: "not-entailment"})
        check_labels(get_task("RTE"), config)

    def test_placeholders_pass_with_a_warning(self, caplog):
        check_labels(get_task("MNLI"), transformers.BertConfig(num_labels=3))
        assert "does not name its classes" in caplog.text

    def test_number_of_outputs(self):
        with pytest.raises(ValueError, match="teacher has 2 outputs; MNLI needs 3"):
            check_labels(get_task("MNLI"), transformers.BertConfig(num_labels=2))
        with pytest.raises(ValueError, match="STS-B needs 1"):
            check_labels(get_task("STS-B"), transformers.BertConfig(num_labels=2))
