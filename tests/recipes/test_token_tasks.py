"""Tests tasks on tokens: files, windows, answers and tags from logits, metrics by hand, losses in float64, the CLI."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _tiny
import numpy as np
import pytest
import torch
from _oracle import error
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    BertForQuestionAnswering,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
    TrainingArguments,
)
from transformers.modeling_outputs import QuestionAnsweringModelOutput, TokenClassifierOutput

from fastdistill import cli
from fastdistill.recipes.glue import get_task
from fastdistill.recipes.token_tasks import (
    SpanTask,
    TaggingTask,
    answer_tokens,
    best_span,
    entities,
    read_conll,
    read_squad,
    squad_metrics,
    tag_metrics,
)
from fastdistill.train.capture import capture
from fastdistill.train.data import PaddingCollator
from fastdistill.train.finetune import finetune
from fastdistill.train.objective import Objective
from fastdistill.train.stages import PredictionStage
from fastdistill.train.trainer import DistillationTrainer

QUICK = {"use_cpu": True, "disable_tqdm": True, "report_to": "none"}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SMALL = SpanTask(name="small", hub_name="none", version="v1.1", max_length=24, stride=5, max_question=8)


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def span_model(layers: int = 1, width: int = 16, seed: int = 0, **options: Any) -> BertForQuestionAnswering:
    torch.manual_seed(seed)
    return BertForQuestionAnswering(
        _tiny.config("bert", layers, width, **{"max_position_embeddings": 400, **options})
    ).eval()


def tagger(labels: list[str], layers: int = 1, width: int = 16, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    config = _tiny.config("bert", layers, width, **{"max_position_embeddings": 130, **names, **options})
    return BertForTokenClassification(config).eval()


def write_squad(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes each row (context, question, answers, more keys) as an article of its own."""
    data = []
    for i, row in enumerate(rows):
        answers = [{"text": text, "answer_start": start} for text, start in row["answers"]]
        question = {"id": f"q{i}", "question": row["question"], **row.get("more", {}), "answers": answers}
        data.append({"title": "t", "paragraphs": [{"context": row["context"], "qas": [question]}]})
    path.write_text(json.dumps({"version": "1.1", "data": data}), encoding="utf-8")
    return path


def marked_questions(count: int, seed: int, unanswerable: bool = False) -> list[dict[str, Any]]:
    """Makes questions whose answer runs from a word of w2..w5 to one of w6..w9; without these there is no answer."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        words = [f"w{draw.randrange(10, 56)}" for _ in range(draw.randrange(6, 12))]
        first = draw.randrange(len(words) - 3)
        last = first + draw.randrange(1, 4)
        answers = []
        if not unanswerable or i % 3:
            words[first], words[last] = f"w{draw.randrange(2, 6)}", f"w{draw.randrange(6, 10)}"
            answers = [(" ".join(words[first : last + 1]), len(" ".join([*words[:first], ""])))]
        more = {"is_impossible": not answers} if unanswerable else {}
        rows.append({"context": " ".join(words), "question": "w0 w1 ?", "answers": answers, "more": more})
    return rows


def write_conll(path: Path, sentences: int, seed: int) -> Path:
    """Writes sentences in which w0..w9 are persons, w10..w19 places; neighbours of one kind form one entity."""
    lines = ["-DOCSTART- -X- O", ""]
    for text in _tiny.texts(sentences, seed):
        previous = "O"
        for word in text.split():
            kind = "PER" if int(word[1:]) < 10 else "LOC" if int(word[1:]) < 20 else None
            previous = "O" if kind is None else f"{'I' if previous[2:] == kind else 'B'}-{kind}"
            lines.append(f"{word} X {previous}")
        lines.append("")
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


# -- SQuAD's files -------------------------------------------------------------------------------------------


class TestReadSquad:
    def test_rows(self, tmp_path: Path) -> None:
        context = "Zürich — the city 🏔 of w1."
        path = write_squad(
            tmp_path / "train-v1.1.json",
            [
                {"context": context, "question": " Where? ", "answers": [("Zürich", 0), ("city 🏔", 13)]},
                {"context": "b", "question": "What?", "answers": [("b", 0)]},
            ],
        )
        rows = get_task("squad").load_split("train", tmp_path)
        assert rows[0] == {
            "id": "q0",
            "question": " Where? ",
            "context": context,
            "answers": ["Zürich", "city 🏔"],
            "starts": [0, 13],
        }
        assert rows["context"][:] == [context, "b"]
        assert read_squad(path)["answers"][:] == rows["answers"][:]

    def test_only_squad2_has_unanswerable_questions(self, tmp_path: Path) -> None:
        open_question = {
            "context": "a b",
            "question": "Why?",
            "answers": [],
            "more": {"is_impossible": True, "plausible_answers": [{"text": "a", "answer_start": 0}]},
        }
        rows = [open_question, {"context": "a b", "question": "b?", "answers": [("b", 2)]}]
        path = write_squad(tmp_path / "dev-v2.0.json", rows)
        assert get_task("SQuAD2").load_split("dev", tmp_path)["answers"][:] == [[], ["b"]]
        with pytest.raises(ValueError, match=r"dev-v2\.0\.json: question q0 has no answer; .* SQuAD2"):
            read_squad(path)

    def test_bad_files(self, tmp_path: Path) -> None:
        def written(text: str) -> Path:
            (tmp_path / "f.json").write_text(text)
            return tmp_path / "f.json"

        with pytest.raises(FileNotFoundError, match=r"none\.json: no such file"):
            read_squad(tmp_path / "none.json")
        with pytest.raises(ValueError, match=r"f\.json: not JSON \(Expecting value"):
            read_squad(written('{"data": '))
        with pytest.raises(ValueError, match=r"f\.json: not laid out as SQuAD's own files.*'data'"):
            read_squad(written('{"rows": []}'))
        with pytest.raises(ValueError, match=r"f\.json: not laid out as SQuAD's own files"):
            read_squad(written('{"data": [{"paragraphs": [{"context": "a", "qas": [1]}]}]}'))
        with pytest.raises(ValueError, match=r"f\.json: no questions"):
            read_squad(written('{"data": []}'))
        for start, found in ((1, "' b'"), (-2, "''"), (9, "''")):
            path = write_squad(tmp_path / "f.json", [{"context": "a b", "question": "?", "answers": [("b ", start)]}])
            with pytest.raises(ValueError, match=rf"question q0: the answer 'b ' should .* {start} .* {found} stands"):
                read_squad(path)

    def test_from_the_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The hub's copy has answers in a struct. `load_dataset` is replaced: nothing is downloaded."""
        asked = []

        def load_dataset(name: str, split: str) -> Dataset:
            asked.append((name, split))
            answers = {"text": ["b"], "answer_start": [2]}
            return Dataset.from_list([{"id": "1", "title": "t", "context": "a b", "question": "?", "answers": answers}])

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        rows = get_task("SQuAD2").load_split("dev")
        assert asked == [("rajpurkar/squad_v2", "validation")]
        assert rows[0] == {"id": "1", "question": "?", "context": "a b", "answers": ["b"], "starts": [2]}


# -- windows and spans ---------------------------------------------------------------------------------------


def long_row(first: int, last: int) -> Dataset:
    """Returns a context of 40 words, of which `first`..`last` are the answer, and a question of 3 tokens."""
    words = [f"w{i}" for i in range(40)]
    text = "  ".join(words)
    answer = "  ".join(words[first : last + 1])
    start = len("  ".join([*words[:first], ""]))
    return Dataset.from_list(
        [{"id": "q", "question": " w1 w2 w3", "context": text, "answers": [answer], "starts": [start]}]
    )


class TestWindows:
    ROOM = 24 - 3 - 3  # context words in a window of 24: without 3 special tokens and the question
    STEP = ROOM - 5

    @pytest.mark.parametrize(("first", "last"), [(0, 0), (12, 14), (13, 17), (16, 19), (39, 39), (3, 30)])
    def test_positions_of_an_answer_in_every_window(self, first: int, last: int) -> None:
        windows = SMALL.tokenize(long_row(first, last), _tiny.tokenizer())
        assert len(windows) == 3
        found = list(zip(windows["start_positions"], windows["end_positions"], strict=True))
        expected = []
        for window in range(3):  # word i is token 5 + i - window * STEP
            begin, end = window * self.STEP, min(window * self.STEP + self.ROOM, 40)
            whole = begin <= first and last < end
            expected.append((5 + first - begin, 5 + last - begin) if whole else (0, 0))
        assert found == expected
        # Only the second window holds all of (16, 19); no window holds (3, 30).
        assert (found.count((0, 0)) == 3) == ((first, last) == (3, 30))

    def test_columns_to_predict_on(self) -> None:
        rows = long_row(0, 0)
        windows = SMALL.encode(Dataset.from_list([*long_row(0, 0), *rows]), _tiny.tokenizer())
        assert windows["row"][:] == [0] * 3 + [1] * 3
        context = rows[0]["context"]
        for window in windows:
            words = [f"w{i - 4}" for i in window["input_ids"]]
            for place, (first, last) in enumerate(zip(window["token_starts"], window["token_ends"], strict=True)):
                is_context = 5 <= place < len(words) - 1
                assert (first >= 0) == is_context
                if is_context:
                    assert context[first:last] == words[place]

    def test_answers_with_spaces_or_parts_of_tokens(self) -> None:
        rows = Dataset.from_list(
            [
                {"id": "1", "question": "w1", "context": "w5 w6 w7", "answers": [" w6 "], "starts": [2]},
                {"id": "2", "question": "w1", "context": "w5 w66 w7", "answers": ["6 w"], "starts": [5]},
            ]
        )
        windows = SMALL.tokenize(rows, _tiny.tokenizer())
        assert windows["start_positions"][:] == [4, 4]
        assert windows["end_positions"][:] == [4, 5]
        offsets = np.array([[-1, -1], [2, 4], [5, 9], [-1, -1]])
        assert answer_tokens(offsets, 2, 9) == (1, 2)
        assert answer_tokens(offsets, 1, 9) is None
        assert answer_tokens(offsets, 2, 10) is None
        assert answer_tokens(offsets[:1], 0, 1) is None

    def test_a_long_question_is_cut(self) -> None:
        rows = Dataset.from_list(
            [{"id": "1", "question": "w1 " * 30, "context": "w5 w6", "answers": ["w6"], "starts": [3]}]
        )
        ids = SMALL.tokenize(rows, _tiny.tokenizer())["input_ids"][0]
        assert ids == [2, *[5] * 8, 3, 9, 10, 3]

    def test_a_window_must_have_room_for_a_new_token(self) -> None:
        with pytest.raises(ValueError, match=r"max_length is 24; .*max_question 8.*, a stride of 12 and .* need 25"):
            SpanTask(name="s", hub_name="s", version="v", max_length=24, stride=12, max_question=8)

    def test_slow_tokenizers_are_refused(self) -> None:
        slow = SimpleNamespace(is_fast=False)
        for task, rows in ((SMALL, long_row(0, 0)), (TaggingTask(name="t", labels=("x",)), tagged([["w1"]], [["x"]]))):
            for method in (task.tokenize, task.encode):
                with pytest.raises(ValueError, match=r"a slow one, .*tokenizer\.json"):
                    method(rows, slow)


@pytest.mark.parametrize("max_answer", [1, 3, 40])
def test_best_span_equals_a_search_over_all_spans(max_answer: int) -> None:
    draw = np.random.default_rng(0)
    for length in (1, 2, 9, 30):
        start, end = draw.normal(size=(2, length))
        allowed = draw.random(length) < 0.7
        spans = [
            (start[i] + end[j], i, j)
            for i in range(length)
            for j in range(i, min(i + max_answer, length))
            if allowed[i] and allowed[j]
        ]
        found = best_span(start, end, allowed, max_answer)
        assert found == (max(spans) if spans else (-np.inf, 0, 0))


class Pointer(nn.Module):
    """Looks logits up by token id; those of the first token also get the bonus of all tokens in the window."""

    def __init__(self, starts: dict[str, float], ends: dict[str, float], bonus: dict[str, float] | None = None) -> None:
        super().__init__()
        self.config = _tiny.config()
        tables = [torch.full((_tiny.VOCABULARY,), -5.0), torch.full((_tiny.VOCABULARY,), -5.0), torch.zeros(60)]
        for table, values in zip(tables, (starts, ends, bonus or {}), strict=True):
            for word, value in values.items():
                table[_tiny.tokenizer().convert_tokens_to_ids(word)] = value
        self.tables = nn.ParameterList(tables)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        start, end, bonus = (table[input_ids] for table in self.tables)
        start, end = start.clone(), end.clone()
        start[:, 0] += bonus.sum(1)
        end[:, 0] += bonus.sum(1)
        if attention_mask is not None:  # padding would win if it counted
            start, end = start.masked_fill(attention_mask == 0, 99.0), end.masked_fill(attention_mask == 0, 99.0)
        return QuestionAnsweringModelOutput(start_logits=start, end_logits=end)


class TestAnswers:
    def answer(self, task: SpanTask, contexts: list[str], pointer: Pointer) -> list[str]:
        rows = [{"id": "", "question": "w1", "context": c, "answers": [], "starts": []} for c in contexts]
        return task.answer(Dataset.from_list(rows), pointer, _tiny.tokenizer())

    def test_answers_are_cut_from_the_text(self) -> None:
        pointer = Pointer({"w8": 3.0}, {"w9": 3.0})
        contexts = ["w7 w8 ,  w9 w7", "w9 w8", "w5,w8-w9!", ""]
        assert self.answer(SMALL, contexts, pointer) == ["w8 ,  w9", "w9", "w8-w9", ""]

    def test_max_answer_limits_the_tokens_of_an_answer(self) -> None:
        pointer = Pointer({"w8": 3.0, "w10": 1.0}, {"w9": 3.0})
        context = ["w8 w7 w10 w7 w9"]
        assert self.answer(SMALL, context, pointer) == context
        short = SpanTask(name="s", hub_name="s", version="v", max_length=24, stride=5, max_question=8, max_answer=4)
        assert self.answer(short, context, pointer) == ["w10 w7 w9"]

    def test_the_best_window_wins(self) -> None:
        words = [f"w{20 + i}" for i in range(35)]
        words[18:21] = ["w8", "w7", "w9"]  # only the second window has the last of them
        words[2] = "w11"
        contexts = [" ".join(words), "w11"]
        for single, expected in ((2.9, ["w8 w7 w9", "w11"]), (3.1, ["w11", "w11"])):
            pointer = Pointer({"w8": 3.0, "w11": single}, {"w9": 3.0, "w11": single})
            assert self.answer(SMALL, contexts, pointer) == expected

    def test_no_answer(self) -> None:
        """The null score is the least start + end of [CLS] over all windows; question tokens cannot be the answer."""
        task = SpanTask(
            name="s", hub_name="s", version="v", max_length=24, stride=5, max_question=8, has_unanswerable=True
        )
        starts, ends = {"w8": 3.0, "w1": 50.0, "[CLS]": 1.0}, {"w9": 3.0, "w1": 50.0, "[CLS]": 1.0}
        pointer = Pointer(starts, ends, bonus={"w12": 1.9, "w13": 2.1})
        contexts = ["w8 w9", "w12 w8 w9", "w13 w8 w9", ""]  # null scores 2, 5.8 and 6.2 against an answer of 6
        assert self.answer(task, contexts, pointer) == ["w8 w9", "w8 w9", "", ""]
        assert self.answer(SMALL, contexts, pointer) == ["w8 w9"] * 3 + [""]
        words = ["w13", *["w20"] * 25, "w8", "w9"]  # null scores 6.2 in the first window, 2 in the second
        assert self.answer(task, [" ".join(words)], pointer) == ["w8 w9"]

    def test_another_model_is_refused(self) -> None:
        with pytest.raises(ValueError, match="BertForSequenceClassification, which predicts no spans"):
            SMALL.answer(long_row(0, 0), _tiny.classifier(), _tiny.tokenizer())


def test_squad_metrics_by_hand() -> None:
    values = squad_metrics(
        ["The  Cat sat.", "black cat", "x", "cat cat dog"],
        [["dog", "cat sat"], ["the black cat sat"], ["y", "z"], ["cat dog dog"]],
    )
    # F1 of each row: 1; 2 common words of 2 and 3, so 4/5; 0; the multisets share cat and dog, so 4/6.
    assert values["exact_match"] == pytest.approx(1 / 4)
    assert values["f1"] == values["score"] == pytest.approx((1 + 0.8 + 0 + 2 / 3) / 4)
    values = squad_metrics(["", "x", "", "An!"], [[], [], ["x"], ["the", "x"]], has_unanswerable=True)
    assert (
        values["exact_match"] == values["f1"] == pytest.approx(1 / 4)
    )  # "the" has no word left, so only "x" is an answer
    for has_unanswerable in (False, True):  # no word on either side: F1 0 by the first script, 1 by the second
        values = squad_metrics(["The"], [["A", "an"]], has_unanswerable=has_unanswerable)
        assert values == {"exact_match": 1, "f1": has_unanswerable, "score": has_unanswerable}
    assert squad_metrics(["x's a-b"], [["Xs ab"]])["exact_match"] == 1
    assert squad_metrics(["theatre an apple"], [["atre apple"]])["f1"] == pytest.approx(1 / 2)


# -- tags ----------------------------------------------------------------------------------------------------


def tagged(words: list[list[str]], tags: list[list[str]]) -> Dataset:
    return Dataset.from_dict({"words": words, "tags": tags})


class TestReadConll:
    def test_rows(self, tmp_path: Path) -> None:
        path = tmp_path / "dev.txt"
        text = "-DOCSTART- -X- -X- O\r\n\r\nEU NNP B-NP B-ORG\r\n, , O O \r\n\n\nzürich\xa0x\tNN  B-NP\tB-LOC"
        path.write_bytes(text.encode())
        rows = get_task("tagging").load_split("dev", tmp_path)
        assert rows["words"][:] == [["EU", ","], ["zürich\xa0x"]]
        assert rows["tags"][:] == [["B-ORG", "O"], ["B-LOC"]]

    def test_bad_files(self, tmp_path: Path) -> None:
        path = tmp_path / "train.txt"
        with pytest.raises(FileNotFoundError, match=r"train\.txt: no such file"):
            read_conll(path)
        for text, message in (
            ("a X\nb\n", r"train\.txt:2: 1 columns; a line has 2"),
            ("\na\n", r"train\.txt:2: 1 columns; a line has 2"),
            ("a X Y Z\n\nb X Y\n", r"train\.txt:3: 3 columns; a line has 4"),
            ("a X\nb c X\n", r"train\.txt:2: 3 columns; a line has 2"),
            ("-DOCSTART- O\n\n", r"train\.txt: no words"),
        ):
            path.write_text(text)
            with pytest.raises(ValueError, match=message):
                read_conll(path)
        path.write_bytes(b"a \xff\n")
        with pytest.raises(ValueError, match="not UTF-8 text"):
            read_conll(path)
        with pytest.raises(ValueError, match="tagging has no data on the hub"):
            get_task("tagging").load_split("train")


class TestTagWindows:
    def test_a_word_is_labelled_at_its_first_token(self) -> None:
        rows = tagged([["w1", "w2-w3", "w4", "'", "w5"], ["w6"]], [["x", "y", "x", "y", "y"], ["x"]])
        windows = TaggingTask(name="t", labels=("y", "x")).tokenize(rows, _tiny.tokenizer())
        assert windows["labels"][:] == [[-100, 1, 0, -100, -100, 1, 0, 0, -100], [-100, 1, -100]]
        assert len(windows["input_ids"][0]) == 9

    def test_no_word_is_lost_nor_counted_twice(self) -> None:
        """Windows have 5 tokens of text; the third word starts in the first window and ends in the second."""
        task = TaggingTask(name="t", labels=("a", "b", "c", "d", "e"), max_length=7)
        rows = tagged([["w1", "w2", "w3-w4-w5", "w6", "w7"], ["w8"] * 12], [["a", "b", "c", "d", "e"], ["a"] * 12])
        labels = task.tokenize(rows, _tiny.tokenizer())["labels"][:]
        assert labels[:2] == [[-100, 0, 1, 2, -100, -100, -100], [-100, -100, -100, 3, 4, -100]]
        assert [label for window in labels[2:] for label in window if label >= 0] == [0] * 12
        windows = task.encode(rows, _tiny.tokenizer())
        assert windows["row"][:] == [0, 0, 1, 1, 1]
        assert windows["word"][1] == [-1, -1, -1, 3, 4, -1]

    def test_tags_of_words(self) -> None:
        """The model tags each token by whether its id is even; a word without tokens is O."""

        class Parity(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.config = _tiny.config(id2label={0: "even", 1: "odd"}, label2id={"even": 0, "odd": 1})
                self.weight = nn.Parameter(torch.zeros(1))

            def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
                return TokenClassifierOutput(logits=torch.nn.functional.one_hot(input_ids % 2, 2).float())

        model = Parity()
        task = TaggingTask(name="t", max_length=6)
        words = [["w1-w2", "w2", "\xa0", "w3", "w4", "w5"], ["w2"]]
        found = task.tag(tagged(words, words), model, _tiny.tokenizer())
        assert found == [["odd", "even", "O", "odd", "even", "odd"], ["even"]]
        golds = [["odd", "even", "odd", "odd", "odd", "odd"], ["even"]]
        assert task.evaluate(tagged(words, golds), model, _tiny.tokenizer())["accuracy"] == pytest.approx(5 / 7)

    def test_labels_come_from_the_model(self) -> None:
        rows = tagged([["w1", "w2"]], [["B-X", "O"]])
        task = get_task("tagging")
        options = task.model_options(rows)
        assert options == {"num_labels": 2, "id2label": {0: "B-X", 1: "O"}, "label2id": {"B-X": 0, "O": 1}}
        turned = task.for_model(tagger(["O", "I-X", "B-X"]).config)
        assert turned.tokenize(rows, _tiny.tokenizer())["labels"][0] == [-100, 2, 0, -100]
        with pytest.raises(ValueError, match=r"have the tags \['B-X'\]; the model's are \['O', 'B-Y'\]"):
            task.for_model(tagger(["O", "B-Y"]).config).tokenize(rows, _tiny.tokenizer())
        with pytest.raises(ValueError, match=r"teacher does not name its tags .*LABEL_0, LABEL_1"):
            task.for_model(_tiny.config(max_position_embeddings=130))
        with pytest.raises(ValueError, match="m reads 64 tokens at most; tagging needs 128"):
            task.for_model(tagger(["O", "B-X"], max_position_embeddings=64).config, "m")
        with pytest.raises(ValueError, match="two or more to tell apart"):
            task.model_options(tagged([["w1"]], [["O"]]))


def test_tag_metrics_by_hand() -> None:
    golds = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-PER", "B-PER"]]
    found = [["B-PER", "I-PER", "O", "O"], ["B-LOC", "B-PER", "I-PER"]]
    # Gold entities: PER 0-1, LOC 3, PER 1, PER 2. Found: PER 0-1, LOC 0, PER 1-2. One is right.
    values = tag_metrics(found, golds)
    assert values == pytest.approx({"precision": 1 / 3, "recall": 1 / 4, "f1": 2 / 7, "score": 2 / 7})
    iob1 = [["I-A", "I-A", "B-A", "O"]]  # two entities
    assert tag_metrics([["B-A", "I-A", "B-A", "O"]], iob1)["f1"] == 1
    assert tag_metrics([["I-A", "I-A", "I-A", "O"]], iob1)["f1"] == 0
    # In IOBES an entity ends after E and S; another kind starts a new entity.
    assert entities(["I-A", "E-A", "E-A", "S-B", "I-B", "O", "B-A", "I-B", "X", "I-A"]) == {
        (0, 1, "A"), (2, 2, "A"), (3, 3, "B"), (4, 4, "B"), (6, 6, "A"), (7, 7, "B"), (9, 9, "A")
    }  # fmt: skip
    assert tag_metrics([["O", "O"]], [["B-A", "O"]]) == {"precision": 0, "recall": 0, "f1": 0, "score": 0}
    assert tag_metrics([["NN", "VB"], ["NN"]], [["NN", "NN"], ["NN"]]) == pytest.approx(
        {"accuracy": 2 / 3, "score": 2 / 3}
    )


# -- other tokenizers ----------------------------------------------------------------------------------------


def trained(kind: str, texts: list[str]) -> PreTrainedTokenizerFast:
    """Trains a tokenizer like RoBERTa's (byte-level BPE), T5's (Unigram, spaces in tokens) or BERT's (lower case)."""
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    if kind == "bytes":
        core, trainer = (
            Tokenizer(models.BPE()),
            trainers.BpeTrainer(
                vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
            ),
        )
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        processor = processors.RobertaProcessing(("</s>", 3), ("<s>", 2), add_prefix_space=False)
    else:
        core, trainer = (
            Tokenizer(models.Unigram()),
            trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>"),
        )
        core.pre_tokenizer = pre_tokenizers.Metaspace()
        if kind == "lower case":
            core = Tokenizer(models.WordPiece(unk_token="<unk>"))
            trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special)
            core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
        )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processor
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


@pytest.mark.parametrize("kind", ["bytes", "spaces in tokens", "lower case"])
def test_labels_as_logits_give_the_answers_and_tags_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits made from the labels of `tokenize` give every answer and tag back, over several windows."""
    draw = random.Random(0)
    known = [
        "The",
        "naïve",
        "café",
        "owner’s",
        "日本語",
        "🏔",
        "re-opened",
        "Zürich",
        "(again)",
        "in",
        "1998",
        "—",
        "well,",
    ]
    sentences = [[draw.choice(known) for _ in range(draw.randrange(1, 60))] for _ in range(30)]
    tokenizer = trained(kind, [" ".join(words) for words in sentences])
    rows = []
    for words in sentences:
        first = draw.randrange(len(words))
        answer = " ".join(words[first : first + draw.randrange(1, 4)])
        start = len(" ".join([*words[:first], ""]))
        rows.append({"question": "Why?", "context": " ".join(words), "answers": [answer], "starts": [start]})
    spans = Dataset.from_list(rows)
    task = SpanTask(name="s", hub_name="s", version="v", max_length=80, stride=40, max_question=16)
    windows = task.tokenize(spans, tokenizer)
    assert len(windows) > len(rows)

    def of_labels(*_: Any) -> list[np.ndarray]:
        found = []
        for window in windows:
            found.append(np.zeros((len(window["input_ids"]), 2)))
            found[-1][[window["start_positions"], window["end_positions"]], [0, 1]] = 1
        return found

    monkeypatch.setattr("fastdistill.recipes.token_tasks.window_logits", of_labels)
    assert task.answer(spans, None, tokenizer) == [row["answers"][0] for row in rows]

    tags = tagged(sentences, [[str(len(word) % 3) for word in words] for words in sentences])
    tagging = TaggingTask(name="t", labels=("0", "1", "2"), max_length=40)
    labels = tagging.tokenize(tags, tokenizer)["labels"][:]
    assert len(labels) > len(rows)
    logits = [np.eye(3)[np.maximum(window, 0)] for window in labels]
    monkeypatch.setattr("fastdistill.recipes.token_tasks.window_logits", lambda *_: logits)
    model = SimpleNamespace(config=SimpleNamespace(id2label={0: "0", 1: "1", 2: "2"}))
    assert tagging.tag(tags, model, tokenizer) == tags["tags"][:]
    assert sum(label >= 0 for window in labels for label in window) == sum(len(words) for words in sentences)


# -- losses --------------------------------------------------------------------------------------------------


def plain_loss(
    student: nn.Module, teacher: nn.Module, rows: Dataset, temperature: float, counts: bool = True
) -> Tensor:
    """Computes the loss row by row, without padding: the mean over rows of start and end, or over labelled tokens."""
    total, items = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            targets = teacher(ids)
        outputs = student(ids)
        names = ["start_logits", "end_logits"] if "start_positions" in row else ["logits"]
        for name in names:
            soft = (targets[name][0] / temperature).softmax(-1)
            losses = -(soft * (outputs[name][0] / temperature).log_softmax(-1)).sum(-1)  # (), or (L)
            if "labels" in row and counts:
                losses = losses[torch.tensor(row["labels"]) != -100]
            total, items = total + losses.sum(), items + losses.numel()
    return total / items


def kinds() -> dict[str, tuple[Any, Any, Dataset]]:
    spans = Dataset.from_list(
        [
            {"id": "", "question": "w1 w2", "context": text, "answers": [text.split()[0]], "starts": [0]}
            for text in _tiny.texts(8)
        ]
    )
    words = [[f"{word}-{word}" if i % 3 else word for i, word in enumerate(text.split())] for text in _tiny.texts(8)]
    tags = tagged(words, [["ABC"[len(word) % 3] for word in sentence] for sentence in words])
    task = TaggingTask(name="t", labels=("A", "B", "C"), max_length=64)
    options = {"width": 16, **NO_DROPOUT}
    return {
        "spans": (
            span_model(**options),
            span_model(2, 24, seed=1),
            get_task("squad").tokenize(spans, _tiny.tokenizer()),
        ),
        "tags": (
            tagger(["A", "B", "C"], **options),
            tagger(["A", "B", "C"], 2, 24, seed=1),
            task.tokenize(tags, _tiny.tokenizer()),
        ),
    }


def run(student: Any, teacher: Any, rows: Dataset, folder: Path, **options: Any) -> DistillationTrainer:
    arguments = {"parity": "masked", "temperature": 1.0}
    arguments = {name: options.pop(name, value) for name, value in arguments.items()}
    return DistillationTrainer(
        student,
        teacher,
        Objective(student.config, teacher.config, terms=("prediction",), **arguments),
        TrainingArguments(output_dir=str(folder), save_strategy="no", logging_steps=1, **QUICK, **options),
        processing_class=_tiny.tokenizer(),
        train_dataset=rows,
        eval_dataset=rows,
    )


CASES = [(8, 1.0, "masked"), (2, 2.5, "masked"), (2, 1.0, "official")]


@pytest.mark.parametrize(("size", "temperature", "parity"), CASES)
@pytest.mark.parametrize("kind", ["spans", "tags"])
def test_a_step_equals_plain_pytorch(tmp_path: Path, kind: str, size: int, temperature: float, parity: str) -> None:
    """Padded batches, accumulated or not, match float64 without padding. The two parities do not differ here."""
    student, teacher, rows = kinds()[kind]
    doubles = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    expected = plain_loss(*doubles, rows, temperature)
    expected.backward()
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    trainer = run(
        student,
        teacher,
        rows,
        tmp_path,
        temperature=temperature,
        parity=parity,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=8 // size,
        max_steps=1,
    )
    trainer.train()
    found = torch.cat([(before[name] - p.detach()).flatten() for name, p in student.named_parameters()])
    truth = torch.cat([p.grad.flatten() for p in doubles[0].parameters()])
    assert error(found, truth) < 1e-4
    assert trainer.state.log_history[0]["prediction"] == pytest.approx(expected.item(), rel=1e-5)
    if kind == "tags":  # the loss differs if special tokens and later tokens of a word count
        assert abs(plain_loss(*doubles, rows, temperature, counts=False) / expected - 1) > 0.001


def test_padding_does_not_change_the_span_loss() -> None:
    """Value and gradient do not depend on the logits of padding, whose own gradient is 0."""
    torch.manual_seed(0)
    student, teacher, rows = kinds()["spans"]
    objective = Objective(student.config, terms=("prediction",))
    batch = PaddingCollator(_tiny.tokenizer())([{"input_ids": row["input_ids"]} for row in rows])
    mask = batch["attention_mask"].bool()
    assert not mask.all()
    states, target = capture(student, batch), capture(teacher, batch)
    assert states.head == "spans"
    assert states.logits.shape == (8, 2, mask.shape[1])
    target.logits = target.logits.detach()
    results = []
    for padding in (0.0, 1e4):
        leaf = states.logits.detach().masked_fill(~mask[:, None], padding).requires_grad_()
        states.logits, target.logits = leaf, target.logits.masked_fill(~mask[:, None], -padding)
        loss = objective(states, target, mask=mask)["prediction"]
        results.append((loss, *torch.autograd.grad(loss, leaf)))
    (loss, gradient), (other, other_gradient) = results
    assert torch.equal(loss, other)
    assert torch.equal(gradient, other_gradient)
    assert gradient.movedim(1, 2)[~mask].abs().max() == 0
    assert (gradient.movedim(1, 2)[mask] != 0).all()


def test_evaluation_of_the_trainer_joins_batches_of_any_length(tmp_path: Path) -> None:
    student, teacher, rows = kinds()["spans"]
    seen = {}

    def metrics(found: Any) -> dict[str, float]:
        (starts, ends), labels = found.predictions, found.label_ids
        seen.update(starts=starts, ends=ends, labels=labels)
        return {"rows": len(starts)}

    trainer = run(student, teacher, rows, tmp_path, per_device_eval_batch_size=3)
    trainer.compute_metrics = metrics
    assert trainer.evaluate()["eval_rows"] == 8
    assert seen["starts"].shape == seen["ends"].shape == (8, max(len(ids) for ids in rows["input_ids"]))
    assert seen["labels"][0].tolist() == rows["start_positions"][:]


def test_token_labels_are_padded_like_their_tokens() -> None:
    collate = PaddingCollator(_tiny.tokenizer())
    rows = [{"input_ids": [2, 5, 3], "labels": [-100, 1, -100]}, {"input_ids": [2, 5, 6, 3], "labels": [-100, 1, 0, 2]}]
    assert collate([dict(row) for row in rows])["labels"].tolist() == [[-100, 1, -100, -100], [-100, 1, 0, 2]]
    assert collate([{"input_ids": [2, 3], "labels": 1}] * 2)["labels"].tolist() == [1, 1]
    scores = [{"input_ids": [2, 5, 3], "labels": [0.5, 1.5]}, {"input_ids": [2, 3], "labels": [0.0, 1.0]}]
    assert collate(scores)["labels"].tolist() == [[0.5, 1.5], [0.0, 1.0]]


# -- whole runs ----------------------------------------------------------------------------------------------


def test_a_student_learns_spans_from_a_teacher(tmp_path: Path) -> None:
    task, tokenizer = get_task("squad"), _tiny.tokenizer()
    train, dev = (
        read_squad(write_squad(tmp_path / f"{seed}.json", marked_questions(count, seed)))
        for seed, count in ((0, 192), (1, 64))
    )
    windows = task.tokenize(train, tokenizer)
    options = {"batch_size": 16, "learning_rate": 1e-2, "arguments": {**QUICK, "logging_steps": 20}}
    teacher, student = span_model(seed=1), span_model(width=8)
    assert task.evaluate(dev, student, tokenizer)["exact_match"] < 0.5
    finetune(teacher, windows, tokenizer, tmp_path / "teacher", epochs=8, **options)
    assert task.evaluate(dev, teacher, tokenizer)["exact_match"] > 0.9
    unlabelled = windows.remove_columns(["start_positions", "end_positions"])
    stage = PredictionStage(dataset=unlabelled, epochs=8, **options)
    stage.run(student, teacher, tokenizer, tmp_path / "student")
    found = task.evaluate(dev, student, tokenizer)
    assert found["exact_match"] > 0.85
    assert found["f1"] >= found["exact_match"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes data for each task, a checkpoint without a head, and a student's config."""
    root = tmp_path_factory.mktemp("token")
    for name, version in (("SQuAD", "v1.1"), ("SQuAD2", "v2.0")):
        (root / name).mkdir()
        for split, rows, seed in (("train", 32, 0), ("dev", 12, 1)):
            questions = marked_questions(rows, seed, unanswerable=name == "SQuAD2")
            write_squad(root / name / f"{split}-{version}.json", questions)
    (root / "tagging").mkdir()
    write_conll(root / "tagging" / "train.txt", 40, 0)
    write_conll(root / "tagging" / "dev.txt", 12, 1)
    _tiny.model(layers=2, max_position_embeddings=400).save_pretrained(root / "plain")
    _tiny.tokenizer().save_pretrained(root / "plain")
    student = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 16}
    (root / "student.json").write_text(json.dumps(student))
    return root


def command(files: Path, name: str, *more: Any) -> list[str]:
    task = ["--task", name, "--data", files / name]
    return [str(part) for part in (more[0], *task, *more[1:])]


def fails(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    capsys.readouterr()
    assert cli.main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    return next(line for line in lines if "error:" in line)


@pytest.mark.parametrize("name", ["SQuAD", "SQuAD2", "tagging"])
def test_the_command_line(
    files: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trains a teacher on the labels and a student in both stages, interrupted and resumed, and evaluates both."""
    teacher, student, short = tmp_path / "teacher", tmp_path / "student", ("--max-steps", 2)
    assert cli.main(command(files, name, "finetune", "--model", files / "plain", "--output", teacher, *short)) == 0
    kind = AutoModelForTokenClassification if name == "tagging" else AutoModelForQuestionAnswering
    labels = ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"] if name == "tagging" else ["LABEL_0", "LABEL_1"]
    assert list(kind.from_pretrained(teacher).config.id2label.values()) == labels

    steps, step = [], DistillationTrainer.training_step

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(self.objective.terms)
        if len(steps) == 4:  # in the prediction stage
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "training_step", interrupted)
    models = ("--teacher", teacher, "--student", files / "student.json", "--output", student)
    argv = command(files, name, "task", *models, *short, "--intermediate-batch-size", 8, "--batch-sizes", 8)
    assert cli.main(argv) == 130
    assert not student.exists()
    assert cli.main([*argv, "--resume"]) == 0
    assert [len(terms) for terms in steps] == [3, 3, 1, 1, 1, 1]  # the intermediate stage ran once
    results = json.loads((student / "results.json").read_text())
    assert list(kind.from_pretrained(student).config.id2label.values()) == labels

    out = tmp_path / "figures.json"
    argv = command(files, name, "evaluate", "--model", student, "--against", teacher, "--json", out)
    capsys.readouterr()
    assert cli.main(argv) == 0
    metrics = ("precision", "recall", "f1") if name == "tagging" else ("exact_match", "f1")
    figures = json.loads(out.read_text())[str(student)]
    assert set(figures["metrics"]["dev"]) == {*metrics, "score"}
    assert figures["metrics"]["dev"]["score"] == pytest.approx(results["best"]["score"])


class TestBadInput:
    def test_a_teacher_without_the_head(self, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        models = ("--teacher", files / "plain", "--student", files / "student.json", "--output", tmp_path / "out")
        line = fails(capsys, command(files, "SQuAD", "task", *models))
        assert "not a trained BertForQuestionAnswering (there is no qa_outputs.bias, qa_outputs.weight)" in line
        assert not (tmp_path / "out").exists()

    def test_tags_the_teacher_does_not_have(
        self, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        models = ("--teacher", tmp_path / "ner", "--student", files / "student.json", "--output", tmp_path / "out")
        tagger(["O", "B-PER"]).save_pretrained(tmp_path / "ner")
        _tiny.tokenizer().save_pretrained(tmp_path / "ner")
        line = fails(capsys, command(files, "tagging", "task", *models))
        assert "have the tags ['B-LOC', 'I-LOC', 'I-PER']; the model's are ['O', 'B-PER']" in line
        assert not (tmp_path / "out.partial").exists()

    def test_a_malformed_dev_file_shows_before_training(
        self, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_conll(tmp_path / "train.txt", 5, 0)
        (tmp_path / "dev.txt").write_text("w1 O\nw2\n")
        argv = ["finetune", "--task", "tagging", "--data", tmp_path, "--model", files / "plain"]
        line = fails(capsys, [str(part) for part in (*argv, "--output", tmp_path / "out")])
        assert "dev.txt:2: 1 columns; a line has 2" in line
        assert not (tmp_path / "out.partial").exists()

    def test_missing_files_and_augmented_rows(
        self, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        argv = ["evaluate", "--task", "SQuAD2", "--data", str(files / "SQuAD"), "--model", str(files / "plain")]
        assert "dev-v2.0.json: no such file; --data holds SQuAD2's own files" in fails(capsys, argv)
        models = ("--teacher", files / "plain", "--student", files / "student.json", "--output", tmp_path / "out")
        argv = command(files, "SQuAD", "task", *models, "--augmented", "x.tsv")
        assert "--task is SQuAD; --augmented holds rows of a GLUE task" in fails(capsys, argv)
        argv = command(files, "SQuAD", "augment", "--teacher", files / "plain", "--glove", "g", "--output", "o.tsv")
        assert "--task is SQuAD; augment makes rows of the GLUE tasks: CoLA" in fails(capsys, argv)
