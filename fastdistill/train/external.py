"""Readers of log-probabilities that were made elsewhere: rows for `write_cache_from`.

    rows = rows_from_vllm(llm.generate(prompts, SamplingParams(prompt_logprobs=50, max_tokens=1)))
    write_cache_from(rows, tokenizer, "cache", top_k=50)
    write_cache_from(rows_from_openai("answers.jsonl", tokenizer), tokenizer, "cache", top_k=20)

docs/cache.md shows what they expect in a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from transformers.utils import logging

__all__ = ["rows_from_openai", "rows_from_vllm"]

logger = logging.get_logger(__name__)

Row: TypeAlias = dict[str, Any]
Source: TypeAlias = str | Path | Iterable[Any]
Listed: TypeAlias = Mapping[int, float] | None  # class -> log-probability of one token

UNKNOWN = -9999.0  # servers return this instead of a log-probability that is lower


def rows_from_vllm(outputs: Source) -> Iterator[Row]:
    """Yields rows for `write_cache_from` from the outputs of vLLM, one for each prompt and completion.

    A row is the prompt and, where the completion has `logprobs`, the completion. vLLM gives the distribution of a token
    at the token's own position; here it moves to the position before, which predicts the token. Tokens without one (the
    first; the prompt's without `prompt_logprobs`) do not count: their label is -100.

    Args:
        outputs: what `LLM.generate` returns, or JSONL files or parsed responses of `vllm serve` (/v1/completions or
            /v1/chat/completions), requested with `prompt_logprobs` or `logprobs` and with `return_token_ids`.
    """
    for number, output in enumerate(records(outputs)):
        for choice in get(output, "outputs") or get(output, "choices") or [{}]:
            ids = first_of("prompt_token_ids", choice, output)
            if ids is None:
                raise ValueError(
                    f"output {number} has no prompt_token_ids; request it with return_token_ids, or add them"
                )
            given = first_of("prompt_logprobs", choice, output) or [None] * len(ids)
            tokens: list[Listed] = [None if x is None else by_id(x) for x in given]
            ids, answer = list(ids), list(get(choice, "token_ids") or ())
            if len(tokens) != len(ids):
                raise ValueError(f"output {number}: {len(tokens)} prompt_logprobs for {len(ids)} prompt_token_ids")
            given = get(choice, "logprobs")
            if given is not None and answer:
                listed = answer_logprobs(given, number)
                if len(listed) != len(answer):
                    raise ValueError(f"output {number}: {len(listed)} logprobs for {len(answer)} token_ids")
                ids, tokens = ids + answer, [*tokens, *listed]
            yield shifted(ids, tokens)


def answer_logprobs(given: Any, number: int) -> list[dict[int, float]]:
    """Returns class -> log-probability for each token of a completion: vLLM's own lists, or those of its server."""
    if isinstance(given, Mapping):
        entries = given.get("content") or given.get("top_logprobs") or ()
        if any(not is_token_id(name) for entry in entries for name, _ in named(entry)):
            raise ValueError(
                f"output {number}: its logprobs name tokens by their text; request return_tokens_as_token_ids, or use "
                "rows_from_openai"
            )
        return [{int(name.split(":")[1]): x for name, x in named(entry)} for entry in entries]
    return [by_id(x) for x in given]


def rows_from_openai(responses: Source, tokenizer: Any) -> Iterator[Row]:
    """Yields rows for `write_cache_from` from responses of an OpenAI-style API, one for each choice.

    The API names tokens by their text, and the tokenizer finds their ids; it must be the teacher's own. Alternatives
    that it does not have are left out, and so are answers with such a token; a warning counts both. The distribution
    of a token moves to the position before, which predicts it. Tokens of the prompt have the label -100.

    Args:
        responses: JSONL files or parsed responses, of chat completions (`logprobs` and `top_logprobs` requested) or of
            completions. Each also has the request's `messages` or `prompt`. A line of a batch's output will do
            (`response.body`), with these beside it.
        tokenizer: its chat template turns `messages` into the prompt.
    """
    find, lost_entries, lost_rows, number = token_finder(tokenizer), 0, 0, -1
    for number, response in enumerate(records(responses)):
        body = (response.get("response") or {}).get("body") or response
        if not body.get("choices"):
            raise ValueError(f"response {number} has no choices; leave it out")
        for choice in body["choices"]:
            given = choice.get("logprobs") or {}
            entries = given.get("content") or legacy_entries(given)
            if not entries:
                raise ValueError(f"response {number} has no logprobs; request them, with top_logprobs")
            ids = [find(entry) for entry in entries]
            if None in ids:
                lost_rows += 1
                continue
            tokens: list[Listed] = []
            for entry in entries:
                listed = {find(alternative): alternative["logprob"] for alternative in alternatives(entry)}
                lost_entries += None in listed
                tokens.append({token: x for token, x in listed.items() if token is not None and x is not None})
            is_echo = entries[0]["logprob"] is None  # the answer begins with the prompt
            prompt = [] if is_echo else prompt_ids({**body, **response}, tokenizer, number)
            yield shifted([*prompt, *ids], [None] * len(prompt) + tokens)
    if lost_entries or lost_rows:
        logger.warning(
            f"{type(tokenizer).__name__} lacks tokens of {lost_rows} answers, which are left out, and alternatives at "
            f"{lost_entries} positions, in {number + 1} responses; it should be the teacher's own tokenizer"
        )


def legacy_entries(given: Mapping[str, Any]) -> list[Row]:
    """Returns the logprobs of the completions API in the form of the chat API's `content`."""
    tokens = given.get("tokens") or []
    tops = given.get("top_logprobs") or [None] * len(tokens)
    return [
        {
            "token": token,
            "logprob": x,
            "top_logprobs": [{"token": name, "logprob": y} for name, y in (top or {}).items()],
        }
        for token, x, top in zip(tokens, given["token_logprobs"] if tokens else [], tops, strict=True)
    ]


def alternatives(entry: Row) -> list[Row]:
    """Returns the listed tokens and the token itself."""
    return [*(entry.get("top_logprobs") or ()), entry]


def prompt_ids(response: Mapping[str, Any], tokenizer: Any, number: int) -> list[int]:
    if (messages := response.get("messages")) is not None:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    prompt = response.get("prompt")
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    if not isinstance(prompt, list) or not all(isinstance(token, int) for token in prompt):
        raise ValueError(f"response {number} has no messages and no prompt (a text, or token ids); add its request's")
    return prompt


def token_finder(tokenizer: Any) -> Callable[[Row], int | None]:
    """Returns a function from an entry {"token", "bytes"} to the token's id; None if it is not one token's alone."""
    vocabulary = tokenizer.get_vocab()
    is_bytes = tokenizer.convert_tokens_to_string(["xĠx"]) == "x x"  # a byte-level BPE
    texts: dict[str, int | None] = {}
    if not is_bytes:
        decoded = tokenizer.batch_decode([[token] for token in vocabulary.values()])
        for text, token in zip(decoded, vocabulary.values(), strict=True):
            texts[text] = None if text in texts else token  # SentencePiece writes "a" and " a" alike

    def find(entry: Row) -> int | None:
        text, raw = entry["token"], entry.get("bytes")
        if is_token_id(text):
            return int(text.split(":")[1])
        if raw is None and "\ufffd" in text:  # part of a character
            return None
        if not is_bytes:
            return texts.get(text)
        if bytes(raw or b"") == "\ufffd".encode():
            return None
        name = "".join(BYTES[byte] for byte in (text.encode() if raw is None else bytes(raw)))
        return vocabulary.get(name, vocabulary.get(text))

    return find


def byte_names() -> list[str]:
    """Returns the character that stands for each byte in the vocabulary of a byte-level BPE (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


BYTES = byte_names()


def shifted(ids: Sequence[Any], tokens: Sequence[Listed]) -> Row:
    """Returns a row, given the distribution that each token was drawn from. Tokens without one are no labels."""
    listed = [{i: x for i, x in (token or {}).items() if x > UNKNOWN} for token in tokens]
    following = [*listed[1:], {}]
    return {
        "input_ids": list(ids),
        "labels": [token if known else -100 for token, known in zip(ids, [{}, *listed[1:]], strict=True)],
        "topk_logprobs": [list(x.values()) for x in following],
        "topk_indices": [list(x) for x in following],
    }


def by_id(entry: Mapping[Any, Any]) -> dict[int, float]:
    """Returns class -> log-probability of vLLM's `{token id: Logprob}`, of the same as JSON, or of plain numbers."""
    found = {}
    for token, x in entry.items():
        value = get(x, "logprob")
        found[int(token)] = float(x if value is None else value)
    return found


def named(entry: Any) -> list[tuple[str, float]]:
    """Returns token and log-probability for each token in an entry of a chat completion or of a completion."""
    if "token" in entry:
        return [(x["token"], x["logprob"]) for x in alternatives(entry)]
    return list(entry.items())


def is_token_id(text: str) -> bool:
    return re.fullmatch(r"token_id:\d+", text) is not None


def records(source: Source) -> Iterator[Any]:
    """Yields the objects of an iterable, or those of JSONL files."""
    for item in [source] if isinstance(source, (str, Path, Mapping)) else source:
        if not isinstance(item, (str, Path)):
            yield item
            continue
        with Path(item).open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{item}, line {number}: no JSON ({error})") from error


def get(x: Any, name: str) -> Any:
    """Returns an entry of a mapping, or an attribute; None without it."""
    return x.get(name) if isinstance(x, Mapping) else getattr(x, name, None)


def first_of(name: str, *places: Any) -> Any:
    return next((found for place in places if (found := get(place, name)) is not None), None)
