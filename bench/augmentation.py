"""`python -m bench.augmentation --model M --glove FILE --data SST-2`: times candidates in batches and word by word.

Both find the K candidates of every word of the same sentences, with the same model in the same process. One is the
library's `Augmenter.candidates`; the other is the published algorithm, with one forward pass for each masked word. The
output is the milliseconds per sentence of each (of the batches in bfloat16 as well) and on how many words they agree.
Each runs twice and the second run is timed, because a matrix product of a new size takes longer the first time.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import Any

import torch

from fastdistill.recipes.augment import STOP_WORDS, Augmenter, Glove, read_glove


@torch.inference_mode()
def one_at_a_time(sentence: str, model: Any, tokenizer: Any, glove: Glove, k: int) -> dict[tuple[int, int], list[str]]:
    """Runs lines 3 to 9 of Algorithm 1 of arXiv 1909.10351, for BERT's and RoBERTa's kinds of vocabulary."""
    vocabulary = words_of(tokenizer)
    ids = torch.tensor(list(vocabulary), device=model.device)
    found = {}
    for match in re.finditer(r"[^\W_]+", sentence):
        word, (start, end) = match[0], match.span()
        if not re.fullmatch("[a-z]+", word.lower()) or word.lower() in STOP_WORDS:
            continue
        before, after = " " + sentence[:start], sentence[end:]
        if len(tokenizer.tokenize(before + word)) == len(tokenizer.tokenize(before.removesuffix(" "))) + 1:
            inputs = tokenizer(before + tokenizer.mask_token + after, " " + sentence, return_tensors="pt")
            place = inputs["input_ids"][0].tolist().index(tokenizer.mask_token_id)
            logits = model(**inputs.to(model.device)).logits[0, place]
            likely = ids[logits[ids].topk(min(k, len(ids))).indices]
            found[start, end] = [vocabulary[i] for i in likely.tolist()]
        elif word.lower() in glove.index:
            cosines = glove.vectors.float() @ glove.vectors[glove.index[word.lower()]].float()
            cosines[glove.index[word.lower()]] = -2
            found[start, end] = [glove.words[i] for i in cosines.topk(min(k, len(cosines) - 1)).indices.tolist()]
    return found


WORDS: dict[int, dict[int, str]] = {}  # by id of the tokenizer; cached, so that neither measurement includes it


def words_of(tokenizer: Any) -> dict[int, str]:
    """Returns the whole words of a vocabulary by id: without `##` in BERT's, after a space in a byte-level one."""
    if id(tokenizer) not in WORDS:
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        if any(token.startswith("Ġ") for token in tokens):
            tokens = [token[1:] if token.startswith("Ġ") else "" for token in tokens]
        WORDS[id(tokenizer)] = {i: token for i, token in enumerate(tokens) if token.isalpha()}
    return WORDS[id(tokenizer)]


def main() -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    from fastdistill.recipes.glue import get_task, load_split

    parser = argparse.ArgumentParser(prog="python -m bench.augmentation", description=__doc__.split(":")[1])
    parser.add_argument("--model", required=True, help="masked language model: folder or hub name")
    parser.add_argument("--glove", type=Path, required=True, metavar="FILE", help="word vectors in GloVe's text format")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="SST-2's tsv files")
    parser.add_argument("--rows", type=int, default=500, help="sentences in batches (default: %(default)s)")
    parser.add_argument("--loop-rows", type=int, help="how many of these to do one word at a time (default: all)")
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    arguments = parser.parse_args()

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model = AutoModelForMaskedLM.from_pretrained(arguments.model, dtype=torch.float32).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    glove = read_glove(arguments.glove, device=device)
    sentences = load_split(get_task("SST-2"), "train", arguments.data)["sentence1"][: arguments.rows]
    some = sentences[: arguments.loop_rows]
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")

    k = 15
    for sentence in some:
        one_at_a_time(sentence, model, tokenizer, glove, k)
    start = time.perf_counter()
    looped = [one_at_a_time(sentence, model, tokenizer, glove, k) for sentence in some]
    loop = (time.perf_counter() - start) / len(some)
    print(f"a word at a time: {len(some)} sentences, {1000 * loop:.1f} ms each")
    for bf16 in (False, True):
        augmenter = Augmenter(model, tokenizer, glove, candidates=k, batch_size=arguments.batch_size, bf16=bf16)
        augmenter.candidates(sentences)
        augmenter.neighbours.clear()
        start = time.perf_counter()
        batched = augmenter.candidates(sentences)
        batches = (time.perf_counter() - start) / len(sentences)
        pairs = [
            (words, batched[row].get(span, [])) for row, spans in enumerate(looped) for span, words in spans.items()
        ]
        same = sum(set(words) == set(others) for words, others in pairs)
        shared = sum(len({*words} & {*others}) for words, others in pairs) / sum(len(words) for words, _ in pairs)
        print(
            f"in batches of {arguments.batch_size}{', bf16' if bf16 else ''}: {len(sentences)} sentences, "
            f"{1000 * batches:.1f} ms each: {loop / batches:.1f}x; {same} of {len(pairs)} words have the same {k} "
            f"candidates, {shared:.1%} of the candidates are the same"
        )


if __name__ == "__main__":
    main()
