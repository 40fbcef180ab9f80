"""Augments data as TinyBERT does (arXiv 1909.10351, Algorithm 1): copies sentences with some of their words replaced.

A word that is a single piece of the masked language model's vocabulary is replaced by one of the words which that model
finds most likely in its place; any other word by one of its nearest neighbours in GloVe. docs/augmentation.md has more.

Defaults are the published ones. As in the published code, the model sees `[CLS] masked [SEP] original [SEP]`, and only
words of the letters a to z that are not stop words are replaced. Everything else stays: case, spaces, punctuation.
"""

from __future__ import annotations

import csv
import hashlib
import math
import random
import re
import shutil
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets.config
import pyarrow as pa  # type: ignore[import-untyped]
import torch
from datasets import Dataset
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from fastdistill.recipes.glue import TASKS, Task, read_tsv
from fastdistill.train.data import pad_inputs
from fastdistill.train.outputs import check, claimed, replace, whole_file, write_arrow, write_whole
from fastdistill.train.processes import on_main, processes
from fastdistill.train.reading import reading
from fastdistill.train.students import positions

# N_a in the published code; the paper uses 20 for all tasks.
COPIES = {task.name: 30 for task in TASKS} | {"MNLI": 10, "QQP": 10, "SST-2": 20, "QNLI": 20}

# The Snowball project's English stop words, and what an apostrophe leaves of words like "don't".
STOP_WORDS = frozenset(
    """
    i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it
    its itself they them their theirs themselves what which who whom this that these those am is are was were be been
    being have has had having do does did doing a an the and but if or because as until while of at by for with about
    against between into through during before after above below to from up down in out on off over under again further
    then once here there when where why how all any both each few more most other some such no nor not only own same so
    than too very can will just should now s t d m o y ll re ve ma ain aren couldn didn doesn don hadn hasn haven isn
    mightn mustn needn shan shouldn wasn weren won wouldn
    """.split()  # noqa: SIM905 - 150 quotes are harder to read
)

Span = tuple[int, int]  # characters [start, end) of a sentence
Row = tuple[str, ...]  # the texts of a row
BASIC_TOKENIZER, BASIC_NORMALIZER = BertPreTokenizer(), BertNormalizer(lowercase=True)


def replaceable_words(sentence: str) -> Iterator[tuple[Span, str]]:
    """Yields where the words are that may be replaced, and each in lower case without accents."""
    for word, span in BASIC_TOKENIZER.pre_tokenize_str(sentence):
        plain = BASIC_NORMALIZER.normalize_str(word)
        if re.fullmatch("[a-z]+", plain) and plain not in STOP_WORDS:
            yield span, plain


def whole_words(tokenizer: Any) -> tuple[list[int], list[str]]:
    """Returns the ids and texts of a vocabulary's whole words: letters that after a space are tokenized as that one id.

    This works for vocabularies that mark word pieces (with `##`) and for those that mark the start of a word.
    """
    ids = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    texts = [text.strip() for text in tokenizer.batch_decode([[i] for i in ids])]
    words = {i: text for i, text in zip(ids, texts, strict=True) if text.isalpha()}
    pieces = tokenizer([" " + word for word in words.values()], add_special_tokens=False)["input_ids"] if words else []
    whole = [i for i, read in zip(words, pieces, strict=True) if read == [i]]
    return whole, [words[i] for i in whole]


def best(scores: Tensor, k: int) -> Tensor:
    """Returns the columns (N, k) of the highest scores (N, V) of each row, highest first, ties by column."""
    k = min(k, scores.shape[1])
    values, columns = scores.topk(min(k + 1, scores.shape[1]))
    tied = (values[:, 1:] == values[:, :-1]).any(1)  # topk returns tied columns in any order
    columns = columns[:, :k]
    if tied.any():
        columns[tied] = scores[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return columns


@dataclass
class Glove:
    """Words and their vectors (V, d) of unit length, float32 or float16, on any device."""

    words: list[str]
    vectors: Tensor

    BLOCK, QUERIES = 1 << 16, 32  # words that are compared at a time, and that are looked up at a time

    def __post_init__(self) -> None:
        self.index = {word: i for i, word in enumerate(self.words)}

    def neighbours(self, words: Sequence[str], k: int) -> list[list[str]]:
        """Returns the k other words nearest to each of `words` by cosine, nearest first. All must be in `index`."""
        found: list[list[str]] = []
        for rows in torch.tensor([self.index[word] for word in words], dtype=torch.int64).split(self.QUERIES):
            query = self.vectors[rows].float()  # (N, d)
            scores = torch.cat([query @ block.float().T for block in self.vectors.split(self.BLOCK)], 1)  # (N, V)
            scores[torch.arange(len(rows)), rows] = -math.inf
            nearest = best(scores, min(k, len(self.words) - 1)).tolist()
            found += [[self.words[i] for i in row] for row in nearest]
        return found


def read_glove(path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Glove:
    """Reads GloVe's text format: UTF-8, on each line a word and the d numbers of its vector between single spaces.

    Line 1 determines d. Words that contain spaces (glove.840B has a few) are skipped; a repeated word counts once, with
    its first vector. The vectors are kept on `device` as torch.float32, or torch.float16 for half the memory.

    Raises FileNotFoundError, and ValueError naming file and line for a line with another number of columns, something
    that is not a finite number, or bytes that are not UTF-8.
    """
    path = Path(path)
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"dtype is {dtype}; it should be torch.float32 or torch.float16")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it should be word vectors in GloVe's text format")
    words: dict[str, None] = {}
    numbers, size = array("f"), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            word, values = _parse_vector(line, size, f"{path}:{number}")
            size = size or len(values)
            if word is not None and word not in words:
                words[word] = None
                numbers.extend(values)
    if not words:
        raise ValueError(f"{path}: no word vectors")
    vectors = torch.frombuffer(numbers, dtype=torch.float32).view(len(words), size)
    vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return Glove(list(words), vectors.to(device, dtype))


NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|[-+]?(nan|inf)", re.I)


def _parse_vector(line: bytes, size: int, where: str) -> tuple[str | None, list[float]]:
    """Returns a line's word (None if it contains spaces) and the numbers of its vector; size 0: all after the first."""
    try:
        # Not str.split(): words contain other characters that count as white space.
        fields = line.decode().rstrip(" \r\n").split(" ")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text (byte {error.start} of the line)") from None
    size = size or len(fields) - 1
    if size < 2:
        raise ValueError(
            f"{where}: {len(fields)} columns; a line is a word and its vector, separated by spaces (a first line of "
            "two counts, as word2vec writes it, has to go)"
        )
    word, vector = fields[:-size], fields[-size:]
    if not word or any(map(NUMBER.fullmatch, word[1:])):
        raise ValueError(f"{where}: {len(fields)} columns; line 1 has {size + 1}, a word and {size} numbers")
    try:
        values = [float(field) for field in vector]
    except ValueError as error:
        wrong = str(error).partition(": ")[2]
        raise ValueError(f"{where}: {wrong} is not a number; after the word come {size} numbers") from None
    if not math.isfinite(sum(values)):
        raise ValueError(f"{where}: the vector is not finite")
    return word[0] if len(word) == 1 else None, values


class Augmenter:
    """Makes copies of sentences (arXiv 1909.10351, Algorithm 1).

    Args:
        model, tokenizer: a masked language model of transformers, on the device to run on, and its tokenizer.
        glove: word vectors for words that are several pieces of the vocabulary.
        copies: N_a, how often a sentence is copied; equal copies are dropped. `COPIES` has each task's number.
        candidates: K, how many words may replace a word.
        probability: p_t, with which a word of a copy is replaced.
        seed: each sentence has its own generator, seeded by this and the sentence's number, so that the order of the
            work does not matter.
        batch_size: how many masked sentences the model sees at a time; it changes the results by rounding at most.
        bf16: run the model's encoder under bfloat16 autocast: faster, with a few other candidates.

    Raises ValueError for numbers out of range, a slow tokenizer, one without a mask token, one of another vocabulary.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        glove: Glove,
        *,
        copies: int = 20,
        candidates: int = 15,
        probability: float = 0.4,
        seed: int = 42,
        batch_size: int = 64,
        bf16: bool = False,
    ) -> None:
        for name, value in (("copies", copies), ("candidates", candidates), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it should be at least 1")
        if not 0 < probability <= 1:
            raise ValueError(f"probability is {probability}; it should be above 0 and at most 1")
        check_tokenizer(tokenizer, model)
        self.model, self.tokenizer, self.glove = model.eval(), tokenizer, glove
        self.copies, self.k, self.probability, self.seed = copies, candidates, probability, seed
        self.batch_size, self.bf16 = batch_size, bf16
        self.device = next(model.parameters()).device
        ids, self.words = whole_words(tokenizer)
        if not ids:
            raise ValueError(f"tokenizer is a {type(tokenizer).__name__} without any whole word in its vocabulary")
        self.word_ids = torch.tensor(ids, device=self.device)
        self.max_length = min(tokenizer.model_max_length, positions(model))
        self.neighbours: dict[str, list[str]] = {}  # of the words looked up so far

    @torch.inference_mode()
    def candidates(self, sentences: Sequence[str]) -> list[dict[Span, list[str]]]:
        """Returns each sentence's replaceable words, as spans of characters, with K words for each, best first."""
        if not sentences:
            return []
        # After a space, vocabularies that mark the start of a word write the first word like any other.
        texts = [" " + sentence for sentence in sentences]
        inputs = self.tokenizer(texts, texts, truncation="longest_first", max_length=self.max_length)
        found: list[dict[Span, list[str]]] = [{} for _ in sentences]
        masked: list[tuple[int, Span, int]] = []  # sentence, characters, token
        looked_up: list[tuple[int, Span, str]] = []
        for row, (text, encoding) in enumerate(zip(texts, inputs.encodings, strict=True)):
            pieces = single_pieces(text, encoding)
            for span, plain in replaceable_words(text):
                found[row][span] = []  # keeps the order of the sentence
                known = [word for word in (text[slice(*span)], plain) if word in self.glove.index]
                if (token := pieces.get(span)) is not None:
                    masked.append((row, span, token))
                elif known:
                    looked_up.append((row, span, known[0]))
        masked.sort(key=lambda place: len(inputs["input_ids"][place[0]]))  # rows of similar length need little padding
        likely = self.likely_words(inputs, [(row, token) for row, _, token in masked])
        near = self.near_words([word for _, _, word in looked_up])
        for (row, span, _), words in zip([*masked, *looked_up], [*likely, *near], strict=True):
            found[row][span] = words
        return [{(a - 1, b - 1): words for (a, b), words in spans.items() if words} for spans in found]

    def near_words(self, words: Sequence[str]) -> list[list[str]]:
        """Returns the K nearest neighbours in GloVe of each word. Each word is looked up only once."""
        new = sorted(set(words) - self.neighbours.keys())
        self.neighbours.update(zip(new, self.glove.neighbours(new, self.k), strict=True))
        return [self.neighbours[word] for word in words]

    def likely_words(self, inputs: Any, masked: Sequence[tuple[int, int]]) -> list[list[str]]:
        """Returns the K likeliest words at each masked place: a row of the tokenizer's output and a token of it."""
        found: list[list[str]] = []
        # Leaving the outermost autocast drops its cache of cast weights; this one keeps the cache over the batches.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=False):
            for start in range(0, len(masked), self.batch_size):
                rows, tokens = zip(*masked[start : start + self.batch_size], strict=True)
                columns = {name: [torch.tensor(values[row]) for row in rows] for name, values in inputs.items()}
                logits = self.masked_logits(columns, torch.tensor(tokens))
                likely = best(logits.float().index_select(1, self.word_ids), self.k)
                found += [[self.words[i] for i in row] for row in likely.tolist()]
        return found

    def masked_logits(self, columns: dict[str, list[Tensor]], tokens: Tensor) -> Tensor:
        """Returns the model's logits (B, V) at one masked token of each encoded text."""
        batch, _ = pad_inputs(columns, self.tokenizer, "right")  # (B, L)
        batch["input_ids"][torch.arange(len(tokens)), tokens] = self.tokenizer.mask_token_id
        with only_at(self.model, tokens.to(self.device), self.bf16):
            logits = self.model(**{name: x.to(self.device) for name, x in batch.items()}).logits
        if logits.shape[1] != 1:
            raise ValueError(f"model is a {type(self.model).__name__}, whose logits are not its base model's output's")
        return logits[:, 0]

    def copy(self, sentence: str, candidates: dict[Span, list[str]], row: int, side: int = 0) -> list[str]:
        """Returns the sentence and its copies that differ; its number and its side of a pair seed the draws."""
        # Only random() gives the same numbers in every Python version.
        draw = random.Random(f"{self.seed} {row} {side}").random
        # Sorting makes the draws independent of rounding in the model.
        choices = [(span, sorted(words)) for span, words in candidates.items()]
        texts = {sentence: None}
        for _ in range(self.copies):
            parts, done = [], 0
            for (start, end), words in choices:
                if draw() < self.probability:
                    parts += [sentence[done:start], words[int(draw() * len(words))]]
                    done = end
            texts["".join([*parts, sentence[done:]])] = None
        return list(texts)

    def rows(self, columns: Sequence[Sequence[str]], first: int = 0, legacy: bool = False) -> list[list[Row]]:
        """Returns the augmented rows of each row: its texts, then its texts with one of them replaced by a copy.

        `columns` are the first texts and, for pairs, the second texts of the rows from number `first` on.
        """
        texts = list(dict.fromkeys(text for column in columns for text in column))
        candidates = dict(zip(texts, self.candidates(texts), strict=True))
        found: list[list[Row]] = []
        for row, sides in enumerate(zip(*columns, strict=True), first):
            ones, *others = (self.copy(text, candidates[text], row, side) for side, text in enumerate(sides))
            found.append([(text, *sides[1:]) for text in ones])
            if others:
                found[-1] += [(ones[-1] if legacy else sides[0], text) for text in others[0][0 if legacy else 1 :]]
        return found


def check_tokenizer(tokenizer: Any, model: PreTrainedModel) -> None:
    name = type(tokenizer).__name__
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer is a {name}, which does not tell where tokens are; it should be a fast one")
    for kind in ("mask", "pad"):
        if getattr(tokenizer, f"{kind}_token_id") is None:
            raise ValueError(f"tokenizer is a {name} without a {kind} token; it should be a masked language model's")
    largest = max(tokenizer.get_vocab().values())
    if largest >= model.config.vocab_size:
        raise ValueError(
            f"tokenizer has token ids up to {largest}, the model {model.config.vocab_size} of them; they should be of "
            "one checkpoint"
        )


def single_pieces(text: str, encoding: Any) -> dict[Span, int | None]:
    """Returns the tokens of the first text of a pair by their characters; None for characters with several tokens."""
    found: dict[Span, int | None] = {}
    for token, ((start, end), sequence) in enumerate(zip(encoding.offsets, encoding.sequence_ids, strict=True)):
        if sequence == 0:
            start = end - len(text[start:end].lstrip())  # some tokenizers count the space before a word
            found[start, end] = None if (start, end) in found else token
    return found


@contextmanager
def only_at(model: PreTrainedModel, places: Tensor, bf16: bool) -> Iterator[None]:
    """Lets the model's head see one place (B) of each row, as its product with the vocabulary costs a whole encoder.

    In BERT and its relatives, the last layer after its attention also sees that place alone, since only the head reads
    it. With `bf16` the encoder runs under bfloat16 autocast, and the head in the model's own precision.
    """
    encoder, rows = model.base_model, torch.arange(len(places), device=places.device)
    forward = encoder.forward

    def at_places(x: Tensor) -> Tensor:
        return x[rows, places][:, None]  # (B, 1, d)

    def one_place(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(places.device.type, torch.bfloat16, enabled=bf16):
            output = forward(*args, **kwargs)
        name = next(iter(output))
        output[name] = (output[name] if hook else at_places(output[name])).to(model.dtype)
        return output

    # After attention, the last layer of these models reads attention's output and its input, both (B, L, d).
    # chunk_size_feed_forward would split the length, and a length of 1 cannot be split.
    config, hook = model.config, None
    families = ("bert", "camembert", "electra", "roberta", "xlm-roberta")
    if config.model_type in families and not config.chunk_size_feed_forward:
        after_attention = encoder.encoder.layer[-1].attention.output
        hook = after_attention.register_forward_pre_hook(lambda _, arguments: tuple(map(at_places, arguments)))
    encoder.forward = one_place
    try:
        yield
    finally:
        del encoder.forward
        if hook:
            hook.remove()


CHUNK = 512  # rows; an interruption loses at most so many


def augment(
    task: Task,
    dataset: Dataset,
    augmenter: Augmenter,
    output: str | Path,
    *,
    legacy: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Writes the augmented rows of a data set to `output`, whole or not at all. `read_augmented` reads them.

    Work in progress is kept in `<output>.partial`, which an interrupted run leaves behind. Processes started with
    `torchrun` or `accelerate launch` share the work. A copy has the label of its original.

    Args:
        dataset: `sentence1`, (`sentence2`), `label`, as `task.load_split` returns them.
        output: `NAME.tsv`, laid out like the task's own train.tsv, or `NAME.arrow`, an Arrow stream with the columns of
            `dataset`, which `datasets.Dataset.from_file` maps into memory.
        legacy: pair the copies of a second sentence with the last copy of the first, as published.
        resume: continue an interrupted run; do nothing if `output` exists.
        overwrite: replace `output`, and drop an interrupted run.

    Raises FileExistsError if `output` or an interrupted run exists and neither flag is set; ValueError for another
    ending of `output`, columns that are not the task's, an interrupted run of other data, another model, other options.
    """
    output, state = Path(output), processes()
    on_main(lambda: check_output(output, resume=resume, overwrite=overwrite))
    if dataset.column_names != task.row_columns:
        raise ValueError(f"dataset has the columns {dataset.column_names}; {task.name} has {task.row_columns}")
    if resume and output.exists():
        return

    with claimed(output, resume=resume, overwrite=overwrite) as work:
        on_main(lambda: check_run(work, fingerprint(task, dataset, augmenter, legacy)))
        chunks = write_chunks(work, task, dataset, augmenter, legacy)
        state.wait_for_everyone()
        if state.is_main_process:
            whole = work / "whole"
            if output.suffix == ".tsv":
                write_tsv(whole, task, read_chunks(chunks))
            else:
                write_arrow(whole, dataset.features.arrow_schema, read_chunks(chunks))
            replace(whole, output)
            shutil.rmtree(work)
    state.wait_for_everyone()


def check_output(output: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Refuses an `output` before any work, as `augment` does."""
    if output.suffix not in (".tsv", ".arrow"):
        raise ValueError(f"output is {output}; its name should end in .tsv or .arrow")
    if output.is_dir():
        raise ValueError(f"output is the folder {output}; it should be a file")
    if not (resume and not overwrite and output.exists()):
        check(output, resume=resume, overwrite=overwrite)


def fingerprint(task: Task, dataset: Dataset, augmenter: Augmenter, legacy: bool) -> str:
    """Returns a digest of everything that the augmented rows depend on."""
    options = (augmenter.copies, augmenter.k, augmenter.probability, augmenter.seed, augmenter.bf16, legacy, CHUNK)
    data = (task.name, dataset.to_dict(), augmenter.words, augmenter.glove.words, options)
    digest = hashlib.sha256(repr(data).encode())
    for x in (augmenter.glove.vectors, *augmenter.model.parameters()):
        digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_run(work: Path, mark: str) -> None:
    """Marks the working folder with the run's fingerprint, and refuses an interrupted run with another one."""
    if not (work / "run").exists():
        write_whole(work / "run", mark)
    elif (work / "run").read_text(encoding="utf-8") != mark:
        raise ValueError(
            f"{work} holds an interrupted run of other data, another model or options; pass overwrite=True to drop it"
        )


def write_chunks(work: Path, task: Task, dataset: Dataset, augmenter: Augmenter, legacy: bool) -> list[Path]:
    """Writes the augmented rows in Arrow files of `CHUNK` original rows. Each process writes its share of them."""
    schema, state = dataset.features.arrow_schema, processes()
    starts = range(0, len(dataset), CHUNK)
    chunks = [work / f"{start:09}.arrow" for start in starts]
    mine = [*zip(starts, chunks, strict=True)][state.process_index :: state.num_processes]
    options = {"desc": f"Augmenting {task.name}", "unit": f" x {CHUNK} rows", "disable": not state.is_main_process}
    for start, chunk in logging.tqdm(mine, **options):
        if not chunk.exists():
            *texts, labels = dataset[start : start + CHUNK].values()
            groups = augmenter.rows(texts, start, legacy)
            rows = [(*row, label) for group, label in zip(groups, labels, strict=True) for row in group]
            columns = dict(zip(schema.names, map(list, zip(*rows, strict=True)), strict=True))
            write_arrow(chunk, schema, [pa.RecordBatch.from_pydict(columns, schema)])
    return chunks


def read_chunks(chunks: Sequence[Path]) -> Iterator[Any]:
    for path in chunks:
        with reading(path):
            table = pa.ipc.open_stream(path).read_all()
            table.validate(full=True)
        yield from table.to_batches()


def write_tsv(path: Path, task: Task, batches: Iterator[Any]) -> None:
    """Writes rows in the layout of the task's own files; the columns that its reader ignores are empty."""
    names = (*task.texts, task.label_column)
    layout: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None, "lineterminator": "\n"}
    with whole_file(path) as work, work.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, task.columns, **layout)
        if task.has_header:
            writer.writeheader()
        for batch in batches:
            for *texts, label in zip(*batch.to_pydict().values(), strict=True):
                # A field of these files cannot contain the characters that end it.
                values = [re.sub(r"[\t\r\n]", " ", text) for text in texts]
                values.append(repr(label) if task.is_regression else task.tsv_labels[label])
                writer.writerow(dict(zip(names, values, strict=True)))


def read_augmented(task: Task, path: str | Path) -> Dataset:
    """Reads the rows that `augment` wrote, from either kind of file.

    Raises FileNotFoundError, and ValueError for a file of another task or with other content.
    """
    if Path(path).suffix != ".arrow":
        return read_tsv(task, path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; it should be what `augment` wrote")
    try:
        dataset = Dataset.from_file(str(in_cache(path)))
        dataset.data.validate(full=True)  # Arrow trusts the offsets in a file
    except Exception as error:  # a damaged file raises errors of many kinds
        raise ValueError(f"{path}: damaged, or not what `augment` wrote ({error})") from error
    if dataset.column_names != task.row_columns:
        raise ValueError(f"{path}: the columns are {dataset.column_names}; {task.name} has {task.row_columns}")
    return dataset


def in_cache(path: str | Path) -> Path:
    """Links a file into the cache of `datasets`, which writes derived files, such as tokenized rows, beside a file."""
    path = Path(path).resolve()
    mark = hashlib.sha256(bytes(path)).hexdigest()[:16]
    link = Path(datasets.config.HF_DATASETS_CACHE, "fastdistill", mark, path.name)
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):  # from an earlier run, or another process
            link.symlink_to(path)
    except OSError:  # Windows lets only some users make links
        return path
    return link
