"""TinyBERT's data augmentation (arXiv 1909.10351, Algorithm 1): copies of a sentence with some of its words replaced.

A word that is one piece of the masked language model's vocabulary is replaced by one of the words that model finds most
likely in its place, any other by one of its nearest neighbours in GloVe:

    glove = read_glove("glove.6B.300d.txt")
    augmenter = Augmenter(masked_lm, tokenizer, glove, copies=COPIES["SST-2"])
    augment(task, load_split(task, "train", "SST-2"), augmenter, "augmented.tsv")

Defaults are the published ones. As in the published code the model sees `[CLS] masked [SEP] original [SEP]`, and only
words of a to z that are not stop words are replaced. What surrounds them stays as it is: case, spaces, punctuation.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
import shutil
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa  # type: ignore[import-untyped]
import torch
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.utils import logging

from fastdistill.recipes.glue import SENTENCES, TASKS, Task, read_tsv
from fastdistill.train.outputs import check, claim, replace, working_folder, write_arrow, write_whole
from fastdistill.train.processes import on_main, processes
from fastdistill.train.students import positions

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["COPIES", "Augmenter", "Glove", "augment", "read_augmented", "read_glove"]

# N_a of the published code; the paper has 20 for all.
COPIES: dict[str, int] = {
    task.name: {"MNLI": 10, "QQP": 10, "SST-2": 20, "QNLI": 20}.get(task.name, 30) for task in TASKS
}

# The Snowball project's English stop words, with the pieces that an apostrophe leaves of "don't" and the like.
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


# -- words -----------------------------------------------------------------------------------------------------

BASIC_TOKENIZER, BASIC_NORMALIZER = BertPreTokenizer(), BertNormalizer(lowercase=True)


def replaceable_words(sentence: str) -> Iterator[tuple[Span, str]]:
    """Where the words that may be replaced are, and each in lower case without accents."""
    for word, span in BASIC_TOKENIZER.pre_tokenize_str(sentence):
        plain = BASIC_NORMALIZER.normalize_str(word)
        if re.fullmatch("[a-z]+", plain) and plain not in STOP_WORDS:
            yield span, plain


def whole_words(tokenizer: Any) -> tuple[list[int], list[str]]:
    """The ids of a vocabulary's whole words, and the words: letters which after a space are read back as that one id.

    This is what tells a word from the piece of one, whether pieces are marked by `##`, or words by a sign of their own.
    """
    ids = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    words = [text.strip() for text in tokenizer.batch_decode([[i] for i in ids])]
    found = [(i, word) for i, word in zip(ids, words, strict=True) if word.isalpha()]
    if not found:
        return [], []
    pieces = tokenizer([" " + word for _, word in found], add_special_tokens=False)["input_ids"]
    found = [(i, word) for (i, word), read in zip(found, pieces, strict=True) if read == [i]]
    return [i for i, _ in found], [word for _, word in found]


def best(scores: Tensor, k: int) -> Tensor:
    """Columns (N, k) of the highest scores (N, V) a row, highest first; of equal scores the first column."""
    k = min(k, scores.shape[1])
    values, columns = scores.topk(min(k + 1, scores.shape[1]))
    tied = (values[:, 1:] == values[:, :-1]).any(1)  # topk takes any of them
    columns = columns[:, :k]
    if tied.any():
        columns[tied] = scores[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return columns


# -- GloVe -----------------------------------------------------------------------------------------------------


@dataclass
class Glove:
    """Word vectors (V, d) of unit length, float32 or float16, on any device, and where each word's is."""

    words: list[str]
    vectors: Tensor

    BLOCK = 1 << 16  # words compared at a time

    def __post_init__(self) -> None:
        self.index = {word: i for i, word in enumerate(self.words)}

    def neighbours(self, words: Sequence[str], k: int) -> list[list[str]]:
        """The k words nearest to each of `words`, which must be in `index`, by cosine, nearest first, not itself."""
        if not words:
            return []
        rows = torch.tensor([self.index[word] for word in words], device=self.vectors.device)
        query = self.vectors[rows].float()  # (N, d)
        scores, columns = query.new_empty(len(rows), 0), rows.new_empty(len(rows), 0)
        for start in range(0, len(self.words), self.BLOCK):
            block = self.vectors[start : start + self.BLOCK].float()
            numbers = torch.arange(start, start + len(block), device=rows.device)
            found = (query @ block.T).masked_fill(numbers == rows[:, None], -math.inf)
            scores = torch.cat([scores, found], 1)
            columns = torch.cat([columns, numbers.expand(len(rows), -1)], 1)
            chosen = best(scores, k)
            scores, columns = scores.gather(1, chosen), columns.gather(1, chosen)
        return [
            [self.words[i] for i, score in zip(*pair, strict=True) if score > -math.inf]
            for pair in zip(columns.tolist(), scores.tolist(), strict=True)
        ]


def read_glove(path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Glove:
    """Read GloVe's text format: UTF-8, a word and the d numbers of its vector on a line, separated by single spaces.

    Line 1 says what d is. A word that holds spaces itself, of which glove.840B has a few, is left out; of a word that
    comes twice the first counts.

    Args:
        dtype: of the vectors kept: torch.float32, or torch.float16 for half the memory.
        device: where they are kept and compared.

    Raises FileNotFoundError, and ValueError naming file and line for a line with another number of columns, something
    that is not a finite number, or bytes that are not UTF-8.
    """
    path = Path(path)
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"dtype is {dtype}; it should be torch.float32 or torch.float16")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it should be word vectors in GloVe's text format")
    words: dict[str, None] = {}
    numbers = array("f")
    size = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                # Not str.split(): words hold other characters that count as white space.
                fields = line.decode().rstrip(" \r\n").split(" ")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 text (byte {error.start} of the line)") from None
            size = size or len(fields) - 1
            if size < 2:
                raise ValueError(
                    f"{where}: {len(fields)} columns; a line is a word and its vector, separated by spaces (a first "
                    "line of two counts, as word2vec writes it, has to go)"
                )
            word, vector = fields[:-size], fields[-size:]
            if not word or any(is_number(field) for field in word[1:]):
                raise ValueError(f"{where}: {len(fields)} columns; line 1 has {size + 1}, a word and {size} numbers")
            try:
                values = [float(field) for field in vector]
            except ValueError:
                wrong = next(field for field in vector if not is_number(field))
                raise ValueError(f"{where}: {wrong!r} is not a number; after the word come {size} numbers") from None
            if not math.isfinite(sum(values)):
                raise ValueError(f"{where}: the vector is not finite")
            if len(word) == 1 and word[0] not in words:
                words[word[0]] = None
                numbers.extend(values)
    if not words:
        raise ValueError(f"{path}: no word vectors")
    vectors = torch.frombuffer(numbers, dtype=torch.float32).view(len(words), size)
    vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return Glove(list(words), vectors.to(device, dtype))


def is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


# -- candidates and copies -----------------------------------------------------------------------------------------


class Augmenter:
    """Makes copies of sentences (arXiv 1909.10351, Algorithm 1).

    Args:
        model: a masked language model of transformers, on the device to run on.
        tokenizer: its own.
        glove: word vectors for the words that are several pieces of its vocabulary.
        copies: N_a, how often a sentence is copied; copies that are equal are dropped. `COPIES` has each task's.
        candidates: K, how many words may replace a word.
        probability: p_t, with which a word of a copy is replaced.
        seed: of the draws. Each sentence has its own generator, of the seed and its number, so that the order of
            the work does not matter.
        batch_size: masked sentences the model sees at a time. The results do not depend on it, as far as the
            model's float32 rounding does not reorder the K-th and the next candidate.
        bf16: bfloat16 autocast in the model's encoder: quicker, and some of the K words are others.

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
        name = type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise ValueError(f"tokenizer is a {name}, which does not tell where tokens are; it should be a fast one")
        for kind in ("mask", "pad"):
            if getattr(tokenizer, f"{kind}_token_id") is None:
                raise ValueError(
                    f"tokenizer is a {name} without a {kind} token; it should be a masked language model's"
                )
        largest = max(tokenizer.get_vocab().values())
        if largest >= model.config.vocab_size:
            raise ValueError(
                f"tokenizer has token ids up to {largest}, the model {model.config.vocab_size} of them; they should be "
                "of one checkpoint"
            )
        self.model, self.tokenizer, self.glove = model.eval(), tokenizer, glove
        self.copies, self.k, self.probability, self.seed = copies, candidates, probability, seed
        self.batch_size, self.bf16 = batch_size, bf16
        self.device = next(model.parameters()).device
        ids, self.words = whole_words(tokenizer)
        if not ids:
            raise ValueError(f"tokenizer is a {name} without any whole word in its vocabulary")
        self.word_ids = torch.tensor(ids, device=self.device)
        self.max_length = min(tokenizer.model_max_length, positions(model))
        self.neighbours: dict[str, list[str]] = {}  # of every word that was looked up

    @torch.inference_mode()
    def candidates(self, sentences: Sequence[str]) -> list[dict[Span, list[str]]]:
        """For each sentence its words that can be replaced, as spans of characters, with K words each, best first."""
        if not sentences:
            return []
        # After a space the first word is written as any other, in vocabularies that tell the two apart.
        texts = [" " + sentence for sentence in sentences]
        encodings = self.tokenizer(texts, texts, truncation="longest_first", max_length=self.max_length).encodings
        found: list[dict[Span, list[str]]] = [{} for _ in sentences]
        masked: list[tuple[int, int, Span]] = []  # sentence, token, characters
        unmasked: list[tuple[int, Span, str]] = []
        for row, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
            pieces = single_pieces(text, encoding)
            for span, plain in replaceable_words(text):
                found[row][span] = []  # in the order of the sentence
                word = text[slice(*span)]
                token = pieces.get(span)
                if token is not None:
                    masked.append((row, token, span))
                elif word in self.glove.index or plain in self.glove.index:
                    unmasked.append((row, span, word if word in self.glove.index else plain))

        new = sorted({word for _, _, word in unmasked} - self.neighbours.keys())
        self.neighbours.update(zip(new, self.glove.neighbours(new, self.k), strict=True))
        for row, span, word in unmasked:
            found[row][span] = self.neighbours[word]

        ids = [torch.tensor(encoding.ids) for encoding in encodings]
        types = [torch.tensor(encoding.type_ids) for encoding in encodings]
        masked.sort(key=lambda place: len(ids[place[0]]))  # rows of like length need little padding
        # The outermost autocast, when it is left, forgets the weights that were cast: this one keeps them so long.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=False):
            for start in range(0, len(masked), self.batch_size):
                batch = masked[start : start + self.batch_size]
                words = self.likely_words(
                    [ids[row] for row, _, _ in batch],
                    [types[row] for row, _, _ in batch],
                    [token for _, token, _ in batch],
                )
                for (row, _, span), likely in zip(batch, words, strict=True):
                    found[row][span] = likely
        return [{(a - 1, b - 1): words for (a, b), words in spans.items() if words} for spans in found]

    def likely_words(self, ids: Sequence[Tensor], types: Sequence[Tensor], tokens: Sequence[int]) -> list[list[str]]:
        """The K likeliest words at one masked token of each row."""
        rows, places = torch.arange(len(ids)), torch.tensor(tokens)
        input_ids = pad_sequence(list(ids), batch_first=True, padding_value=self.tokenizer.pad_token_id)  # (B, L)
        input_ids[rows, places] = self.tokenizer.mask_token_id
        batch = {
            "input_ids": input_ids,
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }
        if "token_type_ids" in self.tokenizer.model_input_names:
            batch["token_type_ids"] = pad_sequence(list(types), batch_first=True)
        with only_at(self.model, places.to(self.device), self.bf16):
            logits = self.model(**{name: x.to(self.device) for name, x in batch.items()}).logits
        if logits.shape[1] != 1:
            raise ValueError(f"model is a {type(self.model).__name__}, whose logits are not its base model's output's")
        likely = best(logits[:, 0].float().index_select(1, self.word_ids), self.k)
        return [[self.words[i] for i in row] for row in likely.tolist()]

    def copy(self, sentence: str, candidates: dict[Span, list[str]], row: int, side: int = 0) -> list[str]:
        """The sentence, and its copies that differ. Its number and side of a pair seed the draws."""
        # Of a generator random() alone is the same in every Python.
        draw = random.Random(f"{self.seed} {row} {side}").random
        # In an order that rounding cannot change.
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

    def rows(
        self, columns: Sequence[Sequence[str]], first: int = 0, legacy: bool = False
    ) -> list[list[tuple[str, ...]]]:
        """The augmented rows of each row: its texts as they are, then with one of them replaced by a copy.

        Args:
            columns: the texts of the rows; of pairs, the first of each and the second of each.
            first: the number of the first row.
            legacy: pair the copies of a second sentence with the last copy of the first, as the published code does.
        """
        texts = list(dict.fromkeys(text for column in columns for text in column))
        candidates = dict(zip(texts, self.candidates(texts), strict=True))
        found: list[list[tuple[str, ...]]] = []
        for row, sides in enumerate(zip(*columns, strict=True), first):
            copies = [self.copy(text, candidates[text], row, side) for side, text in enumerate(sides)]
            found.append([])
            if legacy and len(sides) == 2:
                found[-1] += [(text, sides[1]) for text in copies[0]] + [(copies[0][-1], text) for text in copies[1]]
            elif len(sides) == 2:
                found[-1] += [(text, sides[1]) for text in copies[0]] + [(sides[0], text) for text in copies[1][1:]]
            else:
                found[-1] += [(text,) for text in copies[0]]
        return found


def single_pieces(text: str, encoding: Any) -> dict[Span, int | None]:
    """The tokens of the first text of a pair by the characters they stand for; None for characters of several."""
    found: dict[Span, int | None] = {}
    for token, ((start, end), sequence) in enumerate(zip(encoding.offsets, encoding.sequence_ids, strict=True)):
        if sequence == 0:
            start = end - len(text[start:end].lstrip())  # some tokenizers count the space before a word
            found[start, end] = None if (start, end) in found else token
    return found


@contextmanager
def only_at(model: PreTrainedModel, places: Tensor, bf16: bool) -> Iterator[None]:
    """The model's head sees one place (B) of each row: the product with the vocabulary costs as much as the encoder.

    In BERT's kin so does the last layer from its attention on, which nothing but the head reads. With `bf16` the
    encoder runs under bfloat16 autocast, the head in the model's own precision.
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

    # There its arguments are what attention found and what it found it for, both (B, L, d).
    after_attention = last_after_attention(model)
    hook = after_attention and after_attention.register_forward_pre_hook(
        lambda _, arguments: tuple(at_places(x) for x in arguments)
    )
    encoder.forward = one_place
    try:
        yield
    finally:
        del encoder.forward
        if hook:
            hook.remove()


def last_after_attention(model: PreTrainedModel) -> nn.Module | None:
    """What follows attention in the last layer of BERT and the models written after it; None for others."""
    if model.config.model_type not in ("bert", "camembert", "electra", "roberta", "xlm-roberta"):
        return None
    if model.config.chunk_size_feed_forward:  # which cuts L, and 1 cannot be cut
        return None
    return model.base_model.encoder.layer[-1].attention.output


# -- files ---------------------------------------------------------------------------------------------------------

CHUNK = 512  # rows; what an interruption can cost


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
    """Write the augmented rows of a data set to `output`, whole or not at all. `read_augmented` reads them.

    Work goes on in `<output>.partial` beside it, which an interrupted run leaves behind. Processes that `torchrun` or
    `accelerate launch` starts share the work. Labels are those of the rows that copies are of.

    Args:
        task: whose columns the rows have.
        dataset: `sentence1`, (`sentence2`), `label`, as `fastdistill.recipes.glue.load_split` returns them.
        output: `NAME.tsv`, laid out as the task's own train.tsv, or `NAME.arrow`, an Arrow stream with the columns of
            `dataset`, which `datasets.Dataset.from_file` maps into memory.
        legacy: pair the copies of a second sentence with the last copy of the first, as the published code does,
            instead of the first sentence itself.
        resume: continue an interrupted run; where `output` is there already, do nothing.
        overwrite: replace `output`, and drop an interrupted run.

    Raises:
        FileExistsError: `output` exists, or an interrupted run lies beside it, and neither flag is set.
        ValueError: another ending of `output`, columns that are not the task's, an interrupted run of other data, of
            another model or of other options.
    """
    output, state = Path(output), processes()
    on_main(lambda: check_output(output, resume=resume, overwrite=overwrite))
    names = [*SENTENCES[: len(task.texts)], "label"]
    if dataset.column_names != names:
        raise ValueError(f"dataset has the columns {dataset.column_names}; {task.name} has {names}")
    if resume and output.exists():
        return
    work = working_folder(output)

    def start() -> None:
        claim(output, resume=resume, overwrite=overwrite)
        mark = fingerprint(task, dataset, augmenter, legacy)
        if not (work / "run").exists():
            write_whole(work / "run", mark)
        elif (work / "run").read_text(encoding="utf-8") != mark:
            raise ValueError(
                f"{work} holds an interrupted run of other data, of another model or of other options; pass "
                "overwrite=True to drop it"
            )

    on_main(start)
    schema = dataset.features.arrow_schema
    chunks = [work / f"{start:09}.arrow" for start in range(0, len(dataset), CHUNK)]
    mine = range(state.process_index, len(chunks), state.num_processes)
    options = {"desc": f"Augmenting {task.name}", "unit": f" x {CHUNK} rows", "disable": not state.is_main_process}
    for chunk in logging.tqdm(mine, **options):
        if not chunks[chunk].exists():
            rows = dataset[chunk * CHUNK : (chunk + 1) * CHUNK]
            copies = augmenter.rows([rows[name] for name in names[:-1]], chunk * CHUNK, legacy)
            table = [(*texts, label) for row, label in zip(copies, rows["label"], strict=True) for texts in row]
            columns = dict(zip(names, map(list, zip(*table, strict=True)), strict=True))
            write_arrow(chunks[chunk], schema, [pa.RecordBatch.from_pydict(columns, schema)])
    state.wait_for_everyone()
    if state.is_main_process:
        if output.suffix == ".tsv":
            write_tsv(work / "whole", task, read_chunks(chunks))
        else:
            write_arrow(work / "whole", schema, read_chunks(chunks))
        replace(work / "whole", output)
        shutil.rmtree(work)
    state.wait_for_everyone()


def check_output(output: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """What `augment` says of `output` before any work."""
    if output.suffix not in (".tsv", ".arrow"):
        raise ValueError(f"output is {output}; its name should end in .tsv or .arrow")
    if output.is_dir():
        raise ValueError(f"output is the folder {output}; it should be a file")
    if not (resume and not overwrite and output.exists()):
        check(output, resume=resume, overwrite=overwrite)


def fingerprint(task: Task, dataset: Dataset, augmenter: Augmenter, legacy: bool) -> str:
    """Of everything the rows depend on."""
    options = (augmenter.copies, augmenter.k, augmenter.probability, augmenter.seed, augmenter.bf16, legacy, CHUNK)
    digest = hashlib.sha256(
        repr((task.name, dataset.to_dict(), augmenter.words, augmenter.glove.words, options)).encode()
    )
    for x in (augmenter.glove.vectors, *augmenter.model.parameters()):
        digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_chunks(chunks: Sequence[Path]) -> Iterator[Any]:
    for path in chunks:
        with pa.ipc.open_stream(path) as reader:
            yield from reader


def write_tsv(path: Path, task: Task, batches: Iterator[Any]) -> None:
    """Rows in the layout of the task's own files; columns that are not read are empty."""
    places = [task.columns.index(name) for name in (*task.texts, task.label_column)]
    with path.open("w", encoding="utf-8", newline="\n") as file:
        if task.has_header:
            file.write("\t".join(task.columns) + "\n")
        for batch in batches:
            for *texts, label in zip(*batch.to_pydict().values(), strict=True):
                fields = [""] * len(task.columns)
                # No field of these files can hold what ends it.
                values = [re.sub(r"[\t\r\n]", " ", text) for text in texts]
                values.append(repr(label) if task.is_regression else task.tsv_labels[label])
                for place, value in zip(places, values, strict=True):
                    fields[place] = value
                file.write("\t".join(fields) + "\n")


def read_augmented(task: Task, path: str | Path) -> Dataset:
    """The rows that `augment` wrote, from either kind of file.

    Raises FileNotFoundError, and ValueError for a file that is not of this task.
    """
    from datasets import Dataset

    if Path(path).suffix != ".arrow":
        return read_tsv(task, path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; it should be what `augment` wrote")
    try:
        dataset = Dataset.from_file(str(in_cache(path)))
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path}: damaged, or not what `augment` wrote ({error})") from error
    names = [*SENTENCES[: len(task.texts)], "label"]
    if dataset.column_names != names:
        raise ValueError(f"{path}: the columns are {dataset.column_names}; {task.name} has {names}")
    return dataset


def in_cache(path: str | Path) -> Path:
    """The same file in the cache of `datasets`, which writes what it makes of a file, tokens say, beside it."""
    from datasets import config

    path = Path(path).resolve()
    link = Path(config.HF_DATASETS_CACHE, "fastdistill", hashlib.sha256(bytes(path)).hexdigest()[:16], path.name)
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    except FileExistsError:  # of an earlier run, or another process's
        pass
    except OSError:  # Windows lets only some users make links
        return path
    return link
