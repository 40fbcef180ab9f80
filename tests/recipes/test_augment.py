"""Tests data augmentation against the algorithm run one word at a time; its files, and the command line."""

import copy
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import torch
from _tiny import config
from datasets import Dataset
from test_cli import fails
from tokenizers import AddedToken, ByteLevelBPETokenizer, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForMaskedLM, BertModel, PreTrainedTokenizerFast, RobertaTokenizer

from bench.augmentation import one_at_a_time
from fastdistill import cli
from fastdistill.recipes import augment as module
from fastdistill.recipes.augment import COPIES, STOP_WORDS, Augmenter, Glove, augment, read_augmented, read_glove
from fastdistill.recipes.glue import TASKS, get_task, read_tsv

WORDS = """
    a the is not and film movie actor plot scene story music comedy drama great good fine bad dull weak strong long
    short bright dark quick slow old new young funny sad warm cold hollow clever makes takes gives keeps finds loses
    """.split()  # noqa: SIM905
PIECES = [
    "un",
    "##funny",
    "##wat",
    "##ch",
    "##able",
    "##ly",
    "mel",
    "##od",
    "##rama",
    "(",
    ")",
    ",",
    ".",
    "'",
    "t",
    "don",
]
SPLIT = ["unwatchable", "melodrama", "unfunny"]  # words that are several of WORDS and PIECES
SENTENCES = [
    "the film is a great unwatchable melodrama",
    "A clever plot, a dull actor (and not a good Story).",
    "don't",
    "",
    "funny comedy finds 3d music ",
    "melodrama",
    "the unwatchable unfunny scene keeps its sad drama long and slow and cold and dark",
    "unknownword takes the old movie",
]
GLOVE = ["the", "unwatchable", "awful", "melodrama", "tragedy", "opera", "unfunny", "boring", "2003", "u.s.", "saga"]


GLUE = Path(__file__).resolve().parents[3] / "shared" / "data" / "glue"
REAL_GLOVE = Path(__file__).resolve().parents[3] / "shared" / "data" / "glove" / "glove.6B.50d.first9163.txt"


def bert_tokenizer():
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *PIECES]
    core = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    options = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"], "model_max_length": 64}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names, **options)


def roberta_tokenizer(folder):
    core = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    core.train_from_iterator([" ".join(WORDS)] * 20, vocab_size=600, min_frequency=2, special_tokens=special)
    core.save_model(str(folder))
    mask = AddedToken("<mask>", lstrip=True, special=True)  # as in the published tokenizer
    return RobertaTokenizer.from_pretrained(folder, mask_token=mask)


@pytest.fixture(scope="session")
def lm(tmp_path_factory):
    """Returns a masked language model and its tokenizer for each family."""

    def make(family, tokenizer, **options):
        torch.manual_seed(0)
        names = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **options}
        return AutoModelForMaskedLM.from_config(config(family, 2, 24, **names)).eval(), tokenizer

    roberta = roberta_tokenizer(tmp_path_factory.mktemp("roberta"))
    return {
        "bert": make("bert", bert_tokenizer()),
        "roberta": make("roberta", roberta, type_vocab_size=1, max_position_embeddings=128),
    }


@pytest.fixture(scope="session")
def glove_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("glove") / "glove.txt"
    vectors = np.random.default_rng(0).normal(size=(len(GLOVE), 8))
    path.write_text("".join(f"{w} {' '.join(f'{x:.5f}' for x in v)}\n" for w, v in zip(GLOVE, vectors, strict=True)))
    return path


@pytest.fixture(scope="session")
def glove(glove_file):
    return read_glove(glove_file)


@pytest.fixture
def augmenter(lm, glove):
    return Augmenter(*lm["bert"], glove, candidates=5)


class TestGlove:
    def test_vectors_are_of_unit_length(self, glove_file, glove):
        assert glove.words == GLOVE
        numbers = np.loadtxt(glove_file, usecols=range(1, 9), comments=None)
        expected = numbers / np.linalg.norm(numbers, axis=1, keepdims=True)
        assert np.allclose(glove.vectors.numpy(), expected, atol=1e-6)
        half = read_glove(glove_file, dtype=torch.float16)
        assert half.vectors.dtype == torch.float16
        assert torch.equal(half.vectors, glove.vectors.half())

    @pytest.mark.parametrize("block", [1, 3, 1000])
    def test_neighbours(self, glove, block, monkeypatch):
        """Neighbours are ordered by cosine and exclude the word itself, for any number of words compared at a time."""
        monkeypatch.setattr(Glove, "BLOCK", block)
        cosines = (glove.vectors @ glove.vectors.T).numpy()
        for k in (1, 4, len(GLOVE) - 1, 50):
            found = glove.neighbours(SPLIT, k)
            for word, nearest in zip(SPLIT, found, strict=True):
                order = np.argsort(-cosines[GLOVE.index(word)])
                assert nearest == [GLOVE[i] for i in order if GLOVE[i] != word][:k]
        assert glove.neighbours([], 3) == []

    def test_ties_of_cosines_go_to_the_first_word(self):
        vectors = torch.tensor([[1.0, 0.0]] + [[0.6, 0.8]] * 40 + [[0.0, 1.0]])
        words = ["query", *(f"w{i}" for i in range(40)), "last"]
        for block in (1 << 16, 7):
            Glove.BLOCK = block
            try:
                assert Glove(words, vectors).neighbours(["query"], 5) == [[f"w{i}" for i in range(5)]]
            finally:
                Glove.BLOCK = 1 << 16

    @pytest.mark.data
    @pytest.mark.skipif(not REAL_GLOVE.is_file(), reason="GloVe's file is not at ../shared/data/glove")
    def test_neighbours_in_the_real_file(self):
        glove = read_glove(REAL_GLOVE)
        assert glove.vectors.shape == (9163, 50)
        movie, actor = glove.neighbours(["movie", "actor"], 4)
        assert {"movies", "film", "films"} <= set(movie)
        assert "actress" in actor

    def test_unusual_lines(self, tmp_path):
        """Lines may have other white space, words with spaces, repeated words, numbers as words, any line ends."""
        path = tmp_path / "glove.txt"
        path.write_bytes("a 1 0\r\n\x85 0 1\n. . . 1 1\na 0 1\n12 3 4\n\xa0 1 2 \nat me@x.org 1 1".encode())
        glove = read_glove(path)
        assert glove.words == ["a", "\x85", "12", "\xa0"]
        assert torch.allclose(glove.vectors[[0, 2]], torch.tensor([[1.0, 0.0], [0.6, 0.8]]))

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b"word 1 2", "3 columns; line 1 has 4, a word and 3 numbers"),
            (b"word 1 2 3 4", "5 columns; line 1 has 4"),
            (b"", "1 columns"),
            (b"word 1 x2 3", "'x2' is not a number; after the word come 3 numbers"),
            (b"word 1  3", "'' is not a number"),
            (b"word 1 nan 3", "the vector is not finite"),
            (b"word 1 inf 3", "the vector is not finite"),
            (b"w\xffrd 1 2 3", r"not UTF-8 text \(byte 1 of the line\)"),
        ],
    )
    def test_malformed_lines(self, tmp_path, line, message):
        path = tmp_path / "glove.txt"
        path.write_bytes(b"first 1 2 3\nsecond 4 5 6\n" + line + b"\nlast 1 2 3\n")
        with pytest.raises(ValueError, match=rf"glove\.txt:3: .*{message}"):
            read_glove(path)

    def test_other_files(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere\.txt: no such file; it should be word vectors"):
            read_glove(tmp_path / "nowhere.txt")
        (tmp_path / "word2vec.txt").write_text("400000 300\nthe 1 2 3\n")
        with pytest.raises(ValueError, match=r"word2vec\.txt:1: 2 columns.*has to go"):
            read_glove(tmp_path / "word2vec.txt")
        (tmp_path / "empty.txt").write_text("")
        with pytest.raises(ValueError, match=r"empty\.txt: no word vectors"):
            read_glove(tmp_path / "empty.txt")
        with pytest.raises(ValueError, match=r"dtype is torch\.int8; it should be torch\.float32 or torch\.float16"):
            read_glove(tmp_path / "empty.txt", dtype=torch.int8)


class TestCandidates:
    @pytest.mark.parametrize("batch_size", [1, 7, 64])
    @pytest.mark.parametrize("family", ["bert", "roberta"])
    def test_equal_to_one_word_at_a_time(self, lm, glove, family, batch_size):
        """Both find the same words in the same order. `one_at_a_time` masks text; the library masks tokens."""
        augmenter = Augmenter(*lm[family], glove, candidates=5, batch_size=batch_size)
        expected = [one_at_a_time(sentence, *lm[family], glove, 5) for sentence in SENTENCES]
        found = augmenter.candidates(SENTENCES)
        assert found == expected
        assert sum(map(len, found)) > 20
        for sentence, words in zip(SENTENCES, found, strict=True):  # in the order of the sentence
            assert list(words) == sorted(words), sentence

    def test_which_words_are_replaceable(self, augmenter):
        found = augmenter.candidates(SENTENCES)
        words = [[s[a:b] for a, b in spans] for s, spans in zip(SENTENCES, found, strict=True)]
        assert words[0] == ["film", "great", "unwatchable", "melodrama"]
        assert words[1] == ["clever", "plot", "dull", "actor", "good", "Story"]
        assert words[2] == words[3] == []
        assert words[4] == ["funny", "comedy", "finds", "music"]
        assert words[7] == ["unknownword", "takes", "old", "movie"]  # an unknown word is one token, [UNK]
        assert not any(word.lower() in STOP_WORDS for row in words for word in row)

    def test_words_of_several_pieces_take_neighbours(self, augmenter, glove):
        spans = augmenter.candidates(["melodrama Unfunny film"])[0]
        assert list(spans.values())[:2] == glove.neighbours(["melodrama", "unfunny"], 5)
        assert set(spans[18, 22]) <= set(WORDS) | {"un", "mel", "t", "don"}

    def test_capitals_in_glove(self, lm, glove):
        """glove.840B is cased: the word as written comes first, then the word in lower case."""
        cased = Glove(
            ["melodrama", "Melodrama", "x", "y"], torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
        )
        found = Augmenter(*lm["bert"], cased, candidates=1).candidates(["Melodrama melodrama MELODRAMA"])[0]
        assert list(found.values()) == [["y"], ["x"], ["x"]]

    def test_neighbours_are_looked_up_once(self, augmenter, monkeypatch):
        expected = augmenter.candidates(SENTENCES)
        asked = []
        monkeypatch.setattr(Glove, "neighbours", lambda self, words, k: asked.extend(words) or [[] for _ in words])
        assert augmenter.candidates(SENTENCES) == expected
        assert asked == []

    @pytest.mark.parametrize("family", ["bert", "roberta"])
    def test_candidates_are_whole_words(self, lm, glove, family):
        model, tokenizer = lm[family]
        every = Augmenter(model, tokenizer, glove, candidates=10_000).candidates(["the film is great"])[0]
        for words in every.values():
            assert set(WORDS) <= set(words)
            assert len(words) == len(set(words))
            assert all(word.isalpha() for word in words)
            for word in words:
                assert len(tokenizer.tokenize(" " + word)) == 1
        extra = set(every[4, 8]) - set(WORDS)
        assert extra == ({"un", "mel", "t", "don"} if family == "bert" else extra)
        assert not extra & {"ovie", "ctor", "cene"}  # pieces in the byte-level vocabulary

    @pytest.mark.parametrize(
        ("family", "options"),
        [
            *((family, {}) for family in ("bert", "camembert", "electra", "roberta", "xlm-roberta")),
            ("bert", {"chunk_size_feed_forward": 3}),
            *((family, {}) for family in ("distilbert", "albert", "modernbert", "deberta", "mpnet")),
        ],
    )
    def test_the_head_at_one_place(self, lm, family, options):
        """The logits at one place equal those of a full forward pass, for every family's kind of head."""
        tokenizer = lm["bert"][1]
        settings = config(family, 2, 24, vocab_size=len(tokenizer), **options)
        model = AutoModelForMaskedLM.from_config(settings).eval()
        ids = torch.randint(5, 40, (3, 9))
        places = torch.tensor([8, 0, 4])
        with torch.no_grad():
            whole = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            with module.only_at(model, places, False):
                found = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            again = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert found.shape == (3, 1, len(tokenizer))
        assert torch.allclose(found[:, 0], whole[torch.arange(3), places], atol=1e-5)
        assert torch.equal(whole, again)  # the model is unchanged

    def test_the_last_layer_at_one_place(self, lm):
        """The last layer's feed-forward network sees one token a row; the first layer's sees all."""
        model, _ = lm["bert"]
        ids = torch.randint(5, 40, (3, 9))
        seen = []
        hooks = [
            layer.intermediate.register_forward_pre_hook(lambda _, arguments: seen.append(tuple(arguments[0].shape)))
            for layer in model.bert.encoder.layer
        ]
        with torch.no_grad(), module.only_at(model, torch.tensor([8, 0, 4]), False):
            model(input_ids=ids)
        for hook in hooks:
            hook.remove()
        assert seen == [(3, 9, 24), (3, 1, 24)]

    def test_ties_of_logits_go_to_the_first_id(self):
        scores = torch.randint(0, 3, (50, 40)).float()
        for k in (1, 5, 39, 40, 60):
            expected = [sorted(range(40), key=lambda i: (-row[i].item(), i))[:k] for row in scores]
            assert module.best(scores, k).tolist() == expected

    def test_accents_and_capitals_count_as_letters(self, lm, glove):
        spans = Augmenter(*lm["bert"], glove).candidates(["Fílm Melodrama naïveté"])[0]
        assert list(spans) == [(0, 4), (5, 14), (15, 22)]

    def test_offsets_of_other_tokenizers(self, lm, glove):
        """Some tokenizers count the space before a word to it; both tokens of a two-byte letter have its offsets."""
        model, tokenizer = lm["roberta"]
        expected = Augmenter(model, tokenizer, glove, candidates=5).candidates(SENTENCES)
        other = copy.deepcopy(tokenizer)
        other.backend_tokenizer.post_processor = processors.RobertaProcessing(
            ("</s>", 2), ("<s>", 0), trim_offsets=False, add_prefix_space=False
        )
        assert other(" film").encodings[0].offsets[1] == (0, 5)
        assert tokenizer(" film").encodings[0].offsets[1] == (1, 5)
        assert Augmenter(model, other, glove, candidates=5).candidates(SENTENCES) == expected
        assert list(Augmenter(model, tokenizer, glove).candidates(["film é music"])[0]) == [(0, 4), (7, 12)]

    @pytest.mark.parametrize("family", ["bert", "roberta"])
    def test_sentences_longer_than_the_model_reads(self, lm, glove, family):
        """Words after the cut take their candidates from GloVe, or are not replaced."""
        sentence = "great film " * 40 + "melodrama"
        spans = list(Augmenter(*lm[family], glove).candidates([sentence])[0])
        assert 20 < len(spans) < 70
        assert spans[-1] == (440, 449)

    def test_length_of_every_family(self, lm):
        """Only RoBERTa counts positions from the padding id; a high padding id, as in ModernBERT, costs no length."""
        families = (("bert", 0, 64), ("bert", 30, 64), ("modernbert", 30, 64), ("roberta", 1, 62), ("roberta", 0, 63))
        for family, pad, expected in families:
            model = AutoModelForMaskedLM.from_config(config(family, pad_token_id=pad))
            assert module.positions(model) == expected
            model(input_ids=torch.full((1, expected), 5))  # fails if it is one too many
        assert module.positions(lm["roberta"][0]) == 126

    def test_dropout_is_off(self, lm, glove):
        model, tokenizer = lm["bert"]
        augmenter = Augmenter(model.train(), tokenizer, glove)
        assert augmenter.candidates(SENTENCES) == augmenter.candidates(SENTENCES)

    def test_bf16(self, lm, glove):
        """Most candidates are the same as in float32."""
        augmenters = [Augmenter(*lm["bert"], glove, candidates=15, bf16=bf16) for bf16 in (False, True)]
        one, other = (augmenter.candidates(SENTENCES) for augmenter in augmenters)
        assert one != other
        words = [(set(a[span]), set(b[span])) for a, b in zip(one, other, strict=True) for span in a]
        assert sum(len(a & b) for a, b in words) > 0.9 * sum(len(a) for a, _ in words)

    def test_arguments(self, lm, glove):
        model, tokenizer = lm["bert"]
        for name in ("copies", "candidates", "batch_size"):
            with pytest.raises(ValueError, match=f"{name} is 0; it should be at least 1"):
                Augmenter(model, tokenizer, glove, **{name: 0})
        for probability in (0, 1.5):
            with pytest.raises(ValueError, match=f"probability is {probability}; it should be above 0"):
                Augmenter(model, tokenizer, glove, probability=probability)
        with pytest.raises(ValueError, match=r"token ids up to .*, the model \d+ of them"):
            Augmenter(model, lm["roberta"][1], glove)
        for kind in ("mask", "pad"):
            bare = bert_tokenizer()
            setattr(bare, f"{kind}_token", None)
            with pytest.raises(ValueError, match=f"without a {kind} token"):
                Augmenter(model, bare, glove)


class TestCopies:
    def test_share_of_words_replaced(self, augmenter):
        """Each word of a copy is replaced with probability 0.4, and all of its candidates are equally likely."""
        augmenter.copies = 1  # with more, equal copies would be dropped
        spans = {(0, 3): ["a", "b"], (10, 15): ["x", "y", "z"]}
        texts = [augmenter.copy("one: two, three", spans, row)[-1] for row in range(500)]
        first, last = zip(*(re.fullmatch(r"(\w+): two, (\w+)", text).groups() for text in texts), strict=True)
        for words, k in ((first, 2), (last, 3)):
            counts = Counter(words)
            kept = counts.pop("one", 0) + counts.pop("three", 0)
            assert len(counts) == k
            assert kept / 500 == pytest.approx(0.6, abs=0.08)
            for count in counts.values():
                assert count / 500 == pytest.approx(0.4 / k, abs=0.06)

    def test_the_original_comes_first_and_no_copy_twice(self, augmenter):
        augmenter.copies = 50
        copies = augmenter.copy("a b", {(0, 1): ["a", "c"], (2, 3): ["b", "d"]}, 0)
        assert copies[0] == "a b"
        assert sorted(copies) == ["a b", "a d", "c b", "c d"]
        assert augmenter.copy("a b", {}, 0) == ["a b"]

    def test_text_between_words_is_unchanged(self, lm, glove):
        augmenter = Augmenter(*lm["bert"], glove, probability=1.0, copies=4)
        sentence = "  The FILM,  isn't (great) ."
        for text in augmenter.copy(sentence, augmenter.candidates([sentence])[0], 0):
            assert re.fullmatch(r"  The \w+,  isn't \(\w+\) \.", text)

    def test_seed_row_and_side_change_the_draws(self, lm, glove):
        candidates = Augmenter(*lm["bert"], glove).candidates(SENTENCES[:1])[0]

        def copies(seed, row, side):
            return tuple(Augmenter(*lm["bert"], glove, seed=seed).copy(SENTENCES[0], candidates, row, side))

        assert copies(1, 2, 0) == copies(1, 2, 0)
        others = [(2, 2, 0), (1, 1, 0), (1, 2, 1), (1, 20, 0), (12, 0, 0)]
        assert len({copies(1, 2, 0), *(copies(*other) for other in others)}) == 6

    def test_rounding_does_not_reorder_draws(self, augmenter):
        """The draws do not depend on the order of candidates, which rounding may swap."""
        one, other = (augmenter.copy("a", {(0, 1): words}, 3) for words in (["x", "y", "z"], ["y", "x", "z"]))
        assert one == other


class TestRows:
    def test_single_sentences(self, augmenter):
        rows = augmenter.rows([SENTENCES], first=10)
        candidates = augmenter.candidates(SENTENCES)
        for row, (sentence, found) in enumerate(zip(SENTENCES, rows, strict=True), 10):
            assert found == [(text,) for text in augmenter.copy(sentence, candidates[row - 10], row)]
        assert len(rows[0]) > 15
        assert rows[3] == [("",)]

    def test_pairs(self, augmenter):
        """A copy of one side is paired with the unchanged other side."""
        for first, second in ((SENTENCES[0], SENTENCES[6]), (SENTENCES[6], SENTENCES[6])):
            (rows,) = augmenter.rows([[first], [second]])
            assert rows[0] == (first, second)
            assert len(rows) == len(set(rows))
            changed = Counter((a != first, b != second) for a, b in rows)
            assert changed.keys() == {(False, False), (True, False), (False, True)}
            assert changed[True, False] > 10 < changed[False, True]
            assert {a for a, b in rows if a != first} != {
                b for a, b in rows if b != second
            }  # each side has its own draws

    def test_legacy_pairs(self, augmenter):
        """As published, the second side and its copies are paired with the first side's last copy."""
        first, second = SENTENCES[0], SENTENCES[6]
        candidates = augmenter.candidates([first, second])
        ones, others = (augmenter.copy(s, candidates[i], 5, i) for i, s in enumerate((first, second)))
        (rows,) = augmenter.rows([[first], [second]], first=5, legacy=True)
        assert rows == [(x, second) for x in ones] + [(ones[-1], x) for x in others]
        assert augmenter.rows([[first]], legacy=True) == augmenter.rows([[first]])


def dataset(task, rows=20):
    columns = {"sentence1": [SENTENCES[i % 7] for i in range(rows)]}
    if len(task.texts) == 2:
        columns["sentence2"] = [SENTENCES[i % 5] for i in range(rows)]
    labels = (
        [0.5 * (i % 11) for i in range(rows)] if task.is_regression else [i % len(task.labels) for i in range(rows)]
    )
    return Dataset.from_dict({**columns, "label": labels})


@pytest.fixture(autouse=True)
def cache_of_datasets(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def written(task, rows, augmenter, output, **options):
    augment(task, rows, augmenter, output, **options)
    return read_augmented(task, output)


SST2, RTE = get_task("SST-2"), get_task("RTE")


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 6)


@pytest.mark.usefixtures("small_chunks")
class TestFiles:
    def test_nothing_is_left_beside_the_file(self, augmenter, lm, tmp_path):
        """Files that `datasets` derives go to its cache, and are derived anew if the file is replaced."""
        _, tokenizer = lm["bert"]
        lengths = []
        for rows in (5, 9):
            found = written(SST2, dataset(SST2, rows), augmenter, tmp_path / "out.arrow", overwrite=rows == 9)
            tokens = SST2.tokenize(found, tokenizer)
            assert tokens.cache_files  # the tokens are in a file, not only in memory
            lengths.append(len(tokens))
        assert lengths[0] < lengths[1]
        assert [path.name for path in tmp_path.iterdir()] == ["out.arrow"]

    @pytest.mark.parametrize("name", [task.name for task in TASKS])
    def test_tsv_and_arrow_of_every_task(self, augmenter, name, tmp_path):
        """Both files have the same rows and labels; the tsv file has the layout that the task's own reader expects."""
        task = get_task(name)
        rows = dataset(task, 8)
        expected = []
        for row, (*texts, label) in enumerate(zip(*rows.to_dict().values(), strict=True)):
            (found,) = augmenter.rows([[text] for text in texts], first=row)
            expected += [(*copies, label) for copies in found]
        for ending in ("tsv", "arrow"):
            output = tmp_path / f"{name}.{ending}"
            found = written(task, rows, augmenter, output)
            assert list(zip(*found.to_dict().values(), strict=True)) == expected
            assert found.features == rows.features
            assert read_augmented(task, output).to_dict() == found.to_dict()
        assert read_tsv(task, tmp_path / f"{name}.tsv").to_dict() == found.to_dict()
        own = GLUE / name / "train.tsv"
        if own.is_file():  # other readers find columns by position
            lines = [path.read_text(encoding="utf-8").splitlines()[0] for path in (own, tmp_path / f"{name}.tsv")]
            assert lines[0].count("\t") == lines[1].count("\t")
            assert not task.has_header or lines[0] == lines[1]
        (tmp_path / "cut.arrow").write_bytes((tmp_path / f"{name}.arrow").read_bytes()[:-200])
        with pytest.raises(ValueError, match=r"cut\.arrow: damaged, or not what"):
            read_augmented(task, tmp_path / "cut.arrow")
        (tmp_path / "cut.arrow").unlink()
        assert Dataset.from_file(str(tmp_path / f"{name}.arrow")).to_dict() == found.to_dict()
        assert len(list(tmp_path.iterdir())) == 2

    @pytest.mark.parametrize("ending", ["tsv", "arrow"])
    def test_the_batch_size_does_not_change_the_bytes(self, lm, glove, tmp_path, ending):
        found = set()
        for batch_size in (1, 7, 64):
            output = tmp_path / f"{batch_size}.{ending}"
            augment(RTE, dataset(RTE), Augmenter(*lm["bert"], glove, batch_size=batch_size), output)
            found.add(output.read_bytes())
        assert len(found) == 1

    @pytest.mark.parametrize("chunk", [1, 1000])
    def test_the_chunk_size_does_not_change_the_rows(self, augmenter, tmp_path, monkeypatch, chunk):
        one = written(RTE, dataset(RTE), augmenter, tmp_path / "one.tsv").to_dict()
        monkeypatch.setattr(module, "CHUNK", chunk)
        assert written(RTE, dataset(RTE), augmenter, tmp_path / "other.tsv").to_dict() == one

    def test_legacy(self, augmenter, tmp_path):
        rows = dataset(RTE, 8)
        found = written(RTE, rows, augmenter, tmp_path / "out.arrow", legacy=True)
        expected = augmenter.rows([rows["sentence1"][:], rows["sentence2"][:]], legacy=True)
        pairs = list(zip(found["sentence1"][:], found["sentence2"][:], strict=True))
        assert pairs == [pair for row in expected for pair in row]

    def test_tabs_and_line_ends_in_a_text(self, augmenter, tmp_path):
        rows = Dataset.from_dict({"sentence1": ["a\tb\r\n3"], "label": [1]})
        assert written(SST2, rows, augmenter, tmp_path / "x.tsv")["sentence1"][0] == "a b  3"
        assert written(SST2, rows, augmenter, tmp_path / "x.arrow")["sentence1"][0] == "a\tb\r\n3"

    @pytest.mark.parametrize("ending", ["tsv", "arrow"])
    @pytest.mark.parametrize("stop", ["candidates", "write", "end"])
    def test_killed_and_resumed(self, augmenter, tmp_path, monkeypatch, ending, stop):
        """A killed run leaves no partial output, and a resumed run writes the same bytes as an uninterrupted one."""
        rows, output = dataset(SST2, 27), tmp_path / f"out.{ending}"
        augment(SST2, rows, augmenter, tmp_path / f"whole.{ending}")
        done = []

        def killed(function, when):
            def wrapped(*args):
                done.append(args)
                if len(done) == when:
                    raise KeyboardInterrupt
                return function(*args)

            return wrapped

        with monkeypatch.context() as patch:
            if stop == "candidates":
                patch.setattr(augmenter, "rows", killed(augmenter.rows, 3))
            elif stop == "write":  # stops while a chunk is partly written
                write = module.pa.RecordBatchStreamWriter.write_batch
                patch.setattr(module.pa.RecordBatchStreamWriter, "write_batch", killed(write, 3))
            else:  # stops while the output is partly written, with all chunks complete
                patch.setattr(module, "read_chunks", lambda chunks: half(read_chunks(chunks)))
            read_chunks = module.read_chunks if stop != "end" else READ_CHUNKS
            with pytest.raises(KeyboardInterrupt):
                augment(SST2, rows, augmenter, output)
        assert not output.exists()
        with pytest.raises(FileExistsError, match="holds an interrupted run; pass resume=True"):
            augment(SST2, rows, augmenter, output)

        again = []
        find = augmenter.rows
        monkeypatch.setattr(augmenter, "rows", lambda *args: again.append(args) or find(*args))
        augment(SST2, rows, augmenter, output, resume=True)
        assert len(again) == {"candidates": 3, "write": 3, "end": 0}[stop]  # two of 5 chunks, or all, were complete
        assert output.read_bytes() == (tmp_path / f"whole.{ending}").read_bytes()
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"out.{ending}", f"whole.{ending}"]
        augment(SST2, rows, augmenter, output, resume=True)  # does nothing
        assert len(again) == {"candidates": 3, "write": 3, "end": 0}[stop]

    def test_resuming_another_run_is_refused(self, lm, glove, augmenter, tmp_path, monkeypatch):
        rows, output = dataset(SST2), tmp_path / "out.tsv"

        def interrupted(*args):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(augmenter, "rows", interrupted)
            with pytest.raises(KeyboardInterrupt):
                augment(SST2, rows, augmenter, output)
        model = copy.deepcopy(lm["bert"][0])
        model.bert.encoder.layer[1].output.dense.weight.data[3, 4] += 1e-3
        others = [
            (Augmenter(model, lm["bert"][1], glove, candidates=5), rows, False),
            (Augmenter(*lm["bert"], Glove(glove.words, glove.vectors.flip(0)), candidates=5), rows, False),
            (Augmenter(*lm["bert"], glove, candidates=5, seed=1), rows, False),
            (Augmenter(*lm["bert"], glove, candidates=6), rows, False),
            (Augmenter(*lm["roberta"], glove, candidates=5), rows, False),
            (augmenter, dataset(SST2, 19), False),
            (augmenter, rows, True),
        ]
        for other, data, legacy in others:
            with pytest.raises(ValueError, match=r"holds an interrupted run of other data.*pass overwrite=True"):
                augment(SST2, data, other, output, legacy=legacy, resume=True)
        batches = Augmenter(*lm["bert"], glove, candidates=5, batch_size=3)  # the batch size may change
        expected = written(SST2, rows, augmenter, tmp_path / "whole.tsv").to_dict()
        assert written(SST2, rows, batches, output, resume=True).to_dict() == expected

    def test_outputs_are_not_overwritten(self, augmenter, tmp_path):
        output = tmp_path / "out.tsv"
        output.write_text("mine")
        with pytest.raises(FileExistsError, match="pass overwrite=True"):
            augment(SST2, dataset(SST2), augmenter, output)
        assert output.read_text() == "mine"
        found = written(SST2, dataset(SST2), augmenter, output, overwrite=True)
        assert read_tsv(SST2, output).to_dict() == found.to_dict()
        assert list(tmp_path.iterdir()) == [output]

    def test_arguments(self, augmenter, tmp_path):
        with pytest.raises(ValueError, match=r"out\.csv; its name should end in \.tsv or \.arrow"):
            augment(SST2, dataset(SST2), augmenter, tmp_path / "out.csv")
        (tmp_path / "folder.tsv").mkdir()
        with pytest.raises(ValueError, match=r"output is the folder .*folder\.tsv; it should be a file"):
            augment(SST2, dataset(SST2), augmenter, tmp_path / "folder.tsv")
        with pytest.raises(
            ValueError, match=r"dataset has the columns .*; RTE has \['sentence1', 'sentence2', 'label'\]"
        ):
            augment(RTE, dataset(SST2), augmenter, tmp_path / "out.tsv")
        with pytest.raises(FileNotFoundError, match=r"nowhere\.arrow: no such file"):
            read_augmented(SST2, tmp_path / "nowhere.arrow")
        augment(SST2, dataset(SST2), augmenter, tmp_path / "sst2.arrow")
        with pytest.raises(ValueError, match=r"the columns are \['sentence1', 'label'\]; RTE has"):
            read_augmented(RTE, tmp_path / "sst2.arrow")


READ_CHUNKS = module.read_chunks


def half(batches):
    yield next(batches)
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def files(lm, tmp_path_factory):
    """Writes a masked language model, and training data of SST-2 and RTE."""
    root = tmp_path_factory.mktemp("augment")
    for part in lm["bert"]:
        part.save_pretrained(root / "lm")
    for task in (SST2, RTE):
        rows = dataset(task, 9)
        (root / task.name).mkdir()
        with (root / task.name / "train.tsv").open("w") as file:
            file.write("\t".join((*task.texts, "label")) + "\n")
            for *texts, label in zip(*rows.to_dict().values(), strict=True):
                file.write("\t".join((*texts, task.tsv_labels[label])) + "\n")
    return root


def arguments(files, glove_file, output, task="SST-2"):
    argv = ["augment", "--task", task, "--data", files / task, "--teacher", files / "lm", "--glove", glove_file]
    return [str(part) for part in (*argv, "--output", output)]


class TestCommand:
    @pytest.mark.parametrize("task", ["SST-2", "RTE"])
    def test_writes_what_the_library_does(self, lm, glove, glove_file, files, tmp_path, task, capsys):
        """The command uses the task's published number of copies."""
        output = tmp_path / "out.tsv"
        assert cli.main(arguments(files, glove_file, output, task)) == 0
        copies = {"SST-2": 20, "RTE": 30}[task]
        rows = read_tsv(get_task(task), files / task / "train.tsv")
        augmenter = Augmenter(*lm["bert"], glove, copies=copies)
        augment(get_task(task), rows, augmenter, tmp_path / "expected.tsv")
        assert output.read_bytes() == (tmp_path / "expected.tsv").read_bytes()
        assert f"wrote {output}" in capsys.readouterr().out

    def test_options(self, lm, glove, glove_file, files, tmp_path):
        options = ["--copies", "3", "--candidates", "4", "--probability", "0.7", "--seed", "5", "--batch-size", "9"]
        output = tmp_path / "out.arrow"
        assert cli.main([*arguments(files, glove_file, output, "RTE"), *options, "--legacy", "--bf16"]) == 0
        augmenter = Augmenter(
            *lm["bert"], glove, copies=3, candidates=4, probability=0.7, seed=5, batch_size=9, bf16=True
        )
        rows = read_tsv(RTE, files / "RTE" / "train.tsv")
        augment(RTE, rows, augmenter, tmp_path / "expected.arrow", legacy=True)
        assert output.read_bytes() == (tmp_path / "expected.arrow").read_bytes()

    def test_help(self, capsys):
        with pytest.raises(SystemExit) as end:
            cli.main(["augment", "--help"])
        assert end.value.code == 0
        assert "usage: fastdistill augment" in capsys.readouterr().out

    def test_published_copies(self):
        by_number = {10: ["MNLI", "QQP"], 20: ["SST-2", "QNLI"], 30: ["CoLA", "MRPC", "RTE", "STS-B", "WNLI"]}
        for number, names in by_number.items():
            assert [COPIES[name] for name in names] == [number] * len(names)

    def test_interrupted_and_resumed(self, glove_file, files, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(module, "CHUNK", 4)
        assert cli.main(arguments(files, glove_file, tmp_path / "whole.tsv")) == 0
        rows, calls = Augmenter.rows, []

        def interrupted(*args):
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return rows(*args)

        monkeypatch.setattr(Augmenter, "rows", interrupted)
        argv = arguments(files, glove_file, tmp_path / "out.tsv")
        assert cli.main(argv) == 130
        assert "--resume" in capsys.readouterr().err
        assert "--resume" in fails(capsys, argv)
        assert cli.main([*argv, "--resume"]) == 0
        assert len(calls) == 4
        assert (tmp_path / "out.tsv").read_bytes() == (tmp_path / "whole.tsv").read_bytes()

    def test_bad_input_is_one_line(self, files, glove_file, tmp_path, capsys):
        argv = arguments(files, glove_file, tmp_path / "out.tsv")

        def changed(option, value):
            return [*argv[: argv.index(option) + 1], str(value), *argv[argv.index(option) + 2 :]]

        assert "its name should end in .tsv or .arrow" in fails(capsys, changed("--output", tmp_path / "out"))
        assert "nowhere.txt: no such file" in fails(capsys, changed("--glove", tmp_path / "nowhere.txt"))
        assert "train.tsv: no such file" in fails(capsys, changed("--data", files / "lm"))
        assert "task is 'snli'" in fails(capsys, changed("--task", "snli"))
        assert "--task is SQuAD; augment makes rows of the GLUE tasks" in fails(capsys, changed("--task", "squad"))
        assert "copies is 0; it should be at least 1" in fails(capsys, [*argv, "--copies", "0"])
        bad = tmp_path / "bad.txt"
        bad.write_text("a 1 2\nb 1 x\n")
        assert "bad.txt:2: 'x' is not a number" in fails(capsys, changed("--glove", bad))
        BertModel(config("bert", 1, 24, vocab_size=len(bert_tokenizer()))).save_pretrained(tmp_path / "headless")
        bert_tokenizer().save_pretrained(tmp_path / "headless")
        line = fails(capsys, changed("--teacher", tmp_path / "headless"))
        assert "headless: not a masked language model with its head" in line
        (tmp_path / "out.tsv").write_text("mine")
        assert "--overwrite" in fails(capsys, argv)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.txt", "headless", "out.tsv"]


@pytest.mark.slow
def test_two_processes_write_the_same(files, glove_file, tmp_path):
    for processes in ("1", "2"):
        argv = arguments(files, glove_file, tmp_path / f"{processes}.tsv")
        code = (
            "from fastdistill import cli; from fastdistill.recipes import augment; augment.CHUNK = 2; "
            f"raise SystemExit(cli.main({argv!r}))"
        )
        (tmp_path / "run.py").write_text(code)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes, tmp_path / "run.py"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "1.tsv").read_bytes() == (tmp_path / "2.tsv").read_bytes()
    assert len(list(tmp_path.iterdir())) == 3
