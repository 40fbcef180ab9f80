"""Tests the readers of what vLLM and OpenAI-style APIs return: ids, shifted distributions, labels, refusals."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _tiny
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastdistill.train.external import BYTES, rows_from_openai, rows_from_vllm

# The prompt is tokens 4 5 6 and the completion 7 8; each token's distribution lists itself and others.
PROMPT = [None, {5: -0.5, 9: -1.0}, {6: -2.0, 4: -0.25, 9: -3.0}]
ANSWER = [{7: -0.1, 3: -4.0}, {8: -0.3}]
ROW = {
    "input_ids": [4, 5, 6, 7, 8],
    "labels": [-100, 5, 6, 7, 8],
    "topk_logprobs": [[-0.5, -1.0], [-2.0, -0.25, -3.0], [-0.1, -4.0], [-0.3], []],
    "topk_indices": [[5, 9], [6, 4, 9], [7, 3], [8], []],
}
PROMPT_ROW = {
    "input_ids": [4, 5, 6],
    "labels": [-100, 5, 6],
    "topk_logprobs": [*ROW["topk_logprobs"][:2], []],
    "topk_indices": [*ROW["topk_indices"][:2], []],
}
ANSWER_ROW = {  # without the prompt's distributions
    **ROW,
    "labels": [-100, -100, -100, 7, 8],
    "topk_logprobs": [[], [], *ROW["topk_logprobs"][2:]],
    "topk_indices": [[], [], *ROW["topk_indices"][2:]],
}


def objects(entries: list[Any]) -> list[Any]:
    """Returns distributions as vLLM's Python API has them."""
    return [
        entry and {token: SimpleNamespace(logprob=x, rank=1, decoded_token="w") for token, x in entry.items()}
        for entry in entries
    ]


def served(entries: list[Any]) -> list[Any]:
    """Returns distributions as the JSON of `vllm serve` has them."""
    return [
        entry and {str(token): {"logprob": x, "rank": 1, "decoded_token": "w"} for token, x in entry.items()}
        for entry in entries
    ]


def test_the_outputs_of_vllm() -> None:
    answer = SimpleNamespace(token_ids=[7, 8], logprobs=objects(ANSWER))
    silent = SimpleNamespace(token_ids=(7,), logprobs=None)
    outputs = [
        SimpleNamespace(prompt_token_ids=[4, 5, 6], prompt_logprobs=objects(PROMPT), outputs=[answer, silent]),
        SimpleNamespace(prompt_token_ids=[4, 5, 6], prompt_logprobs=None, outputs=[answer]),
    ]
    assert list(rows_from_vllm(outputs)) == [ROW, PROMPT_ROW, ANSWER_ROW]


def test_the_responses_of_vllm_serve(tmp_path: Path) -> None:
    prompt = {"prompt_token_ids": [4, 5, 6], "prompt_logprobs": served(PROMPT)}
    named = [{f"token_id:{token}": x for token, x in entry.items()} for entry in ANSWER]
    content = [
        {"token": f"token_id:{token}", "logprob": entry[token],
         "top_logprobs": [{"token": f"token_id:{other}", "logprob": x} for other, x in entry.items() if other != token]}
        for token, entry in zip((7, 8), ANSWER, strict=True)
    ]  # fmt: skip
    completion = {"choices": [{**prompt, "token_ids": [7, 8], "logprobs": {"top_logprobs": named}}]}
    chat = {**prompt, "choices": [{"token_ids": [7, 8], "logprobs": {"content": content}}]}
    alone = {"choices": [{**prompt, "token_ids": [7], "logprobs": None}]}
    path = tmp_path / "responses.jsonl"
    path.write_text("\n".join(json.dumps(x) for x in (completion, chat, alone)) + "\n\n")
    found = list(rows_from_vllm(path))
    for row, expected in zip(found, (ROW, ROW, PROMPT_ROW), strict=True):
        assert row["input_ids"] == expected["input_ids"]
        assert row["labels"] == expected["labels"]
        for i, logprobs in enumerate(expected["topk_logprobs"]):
            listed = dict(zip(row["topk_indices"][i], row["topk_logprobs"][i], strict=True))
            assert listed == dict(zip(expected["topk_indices"][i], logprobs, strict=True))
    assert list(rows_from_vllm([str(path)])) == list(rows_from_vllm([path])) == found
    assert list(rows_from_vllm(alone)) == [PROMPT_ROW]


def test_what_stands_for_an_unknown_log_probability_is_left_out() -> None:
    output = {"prompt_token_ids": [4, 5], "prompt_logprobs": [None, {"5": -0.5, "9": -9999.0, "8": -math.inf}]}
    assert next(rows_from_vllm([output]))["topk_indices"] == [[5], []]


@pytest.mark.parametrize(
    "output, message",
    [
        ({"prompt_logprobs": [None]}, "output 0 has no prompt_token_ids; request it with return_token_ids"),
        ({"prompt_token_ids": [4], "prompt_logprobs": PROMPT}, "output 0: 3 prompt_logprobs for 1 prompt_token_ids"),
        (
            {"prompt_token_ids": [4], "outputs": [{"token_ids": [7], "logprobs": ANSWER}]},
            "output 0: 2 logprobs for 1 token_ids",
        ),
        (
            {"prompt_token_ids": [4], "choices": [{"token_ids": [7], "logprobs": {"top_logprobs": [{"w": -1}]}}]},
            "output 0: its logprobs name tokens by their text; request return_tokens_as_token_ids",
        ),
    ],
)
def test_outputs_that_say_too_little(output: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(rows_from_vllm([output]))


def test_lines_that_are_no_json(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"prompt_token_ids": [4]}\n{oops\n')
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: no JSON"):
        list(rows_from_vllm(tmp_path / "x.jsonl"))


# -- OpenAI's form -------------------------------------------------------------------------------------------

WORDS = ["hello", " world", "é", " ", "!", "�"]


def byte_level() -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer: 256 bytes, a few words, two special tokens, and a chat template."""
    vocabulary = {name: i for i, name in enumerate(BYTES)}
    for word in WORDS:
        vocabulary.setdefault("".join(BYTES[byte] for byte in word.encode()), len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", additional_special_tokens=["<a>"])
    found.chat_template = "{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}<a>"
    return found


def token(text: str, logprob: float | None = -0.5, *others: tuple[str, float], raw: Any = "utf-8") -> dict[str, Any]:
    """Returns an entry of `content`."""
    listed = [{"token": other, "logprob": x, "bytes": list(other.encode())} for other, x in others]
    named = list(text.encode()) if raw == "utf-8" else raw
    return {"token": text, "logprob": logprob, "bytes": named, "top_logprobs": listed}


def chat(*content: dict[str, Any], **more: Any) -> dict[str, Any]:
    choice = {"message": {"content": "..."}, "logprobs": {"content": list(content)}}
    return {"choices": [choice], "messages": [{"role": "user", "content": "ab"}], **more}


def test_the_table_of_bytes_is_that_of_tokenizers() -> None:
    assert sorted(BYTES) == sorted(pre_tokenizers.ByteLevel.alphabet())
    for text in ("é", "a b", "\x00\x7f\xad", "語"):
        pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
        assert "".join(BYTES[byte] for byte in text.encode()) == pieces[0][0]


def test_a_chat_completion(tmp_path: Path) -> None:
    tokenizer = byte_level()
    ids = tokenizer.get_vocab()
    hello, world = ids["hello"], ids["Ġworld"]
    response = chat(
        token("hello", -0.25, ("hello", -0.25), (" world", -2.0)),
        token(" world", -3.0, ("é", -0.1), ("<eos>", -9999.0)),
        token("\\xc3", -0.7, raw=[0xC3]),  # half a character
        token("<eos>", -0.2),
    )
    expected = {
        "input_ids": [ids["a"], ids["b"], ids["<eos>"], ids["<a>"], hello, world, ids["Ã"], ids["<eos>"]],
        "labels": [-100, -100, -100, -100, hello, world, ids["Ã"], ids["<eos>"]],
        "topk_logprobs": [[], [], [], [-0.25, -2.0], [-0.1, -3.0], [-0.7], [-0.2], []],
        "topk_indices": [[], [], [], [hello, world], [ids["Ã©"], world], [ids["Ã"]], [ids["<eos>"]], []],
    }
    path = tmp_path / "out.jsonl"
    batch = {"custom_id": "1", "response": {"status_code": 200, "body": response}, "messages": response.pop("messages")}
    path.write_text(json.dumps({**response, "messages": batch["messages"]}) + "\n" + json.dumps(batch) + "\n")
    assert list(rows_from_openai(path, tokenizer)) == [expected, expected]


def test_a_completion_with_and_without_its_prompt() -> None:
    tokenizer = byte_level()
    ids = tokenizer.get_vocab()
    given = {"tokens": ["hello", "!"], "token_logprobs": [-0.5, -1.0], "top_logprobs": [{"é": -1.0}, None]}
    row = next(rows_from_openai([{"choices": [{"logprobs": given}], "prompt": "ab"}], tokenizer))
    assert row["input_ids"] == [ids["a"], ids["b"], ids["hello"], ids["!"]]
    assert row["labels"] == [-100, -100, *row["input_ids"][2:]]
    assert row["topk_indices"] == [[], [ids["Ã©"], ids["hello"]], [ids["!"]], []]
    same = next(rows_from_openai([{"choices": [{"logprobs": given}], "prompt": row["input_ids"][:2]}], tokenizer))
    assert same == row
    given = {"tokens": ["hello", "!"], "token_logprobs": [None, -1.0], "top_logprobs": [None, {"!": -1.0}]}  # echo
    row = next(rows_from_openai([{"choices": [{"logprobs": given}]}], tokenizer))
    assert row["input_ids"] == [ids["hello"], ids["!"]]
    assert row["topk_indices"] == [[ids["!"]], []]


def test_tokens_that_the_tokenizer_lacks_are_counted(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_level()
    ids = tokenizer.get_vocab()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    broken = token("�", raw=list("�".encode()))  # what servers return for half a character
    responses = [
        chat(token("hello", -0.5, ("nowhere", -1.0), ("�", -2.0), ("!", -3.0))),
        chat(token("nowhere")),
        chat(token("hello"), broken),
        chat(token("hello"), token("�", raw=None)),
    ]
    found = list(rows_from_openai(responses, tokenizer))
    assert [row["input_ids"][-1] for row in found] == [ids["hello"]]
    assert found[0]["topk_indices"][-2] == [ids["!"], ids["hello"]]
    assert "lacks tokens of 3 answers, which are left out, and alternatives at 1 positions, in 4 resp" in caplog.text


def test_texts_of_two_tokens_are_nobodys(caplog: pytest.LogCaptureFixture) -> None:
    """SentencePiece decodes "▁a" alone as "a", which is another token's text."""
    vocabulary = {"<unk>": 0, "▁a": 1, "a": 2, "▁b": 3, "c": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    response = {**chat(token("b", -0.5, ("a", -1.0), ("c", -2.0))), "messages": None, "prompt": [4]}
    row = next(rows_from_openai([response], wrapped))
    assert row["input_ids"] == [4, 3]
    assert row["topk_indices"] == [[4, 3], []]
    named = {**chat(token("token_id:2", raw=None)), "messages": None, "prompt": [4]}
    assert next(rows_from_openai([named], wrapped))["input_ids"] == [4, 2]


@pytest.mark.parametrize(
    "response, message",
    [
        ({"error": "busy"}, "response 0 has no choices; leave it out"),
        ({"choices": [{"logprobs": None}]}, "response 0 has no logprobs; request them, with top_logprobs"),
        (chat(token("w1", raw=None), messages=None), "response 0 has no messages and no prompt"),
        (chat(token("w1", raw=None), messages=None, prompt=["a", "b"]), r"no prompt \(a text, or token ids\)"),
    ],
)
def test_responses_that_say_too_little(response: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(rows_from_openai([response], _tiny.tokenizer()))
