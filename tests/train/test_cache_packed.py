"""Tests caches of packed rows: the teacher reads each document by itself, and the rows keep their columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import _tiny
import pytest
import torch
from datasets import Dataset
from test_cache import causal, distribution, is_rounded, masked, rows, write
from transformers import GPT2LMHeadModel

from fastdistill.train.cache import read_cache


def packed(per_row: int = 3) -> tuple[Dataset, list[list[list[int]]]]:
    """Returns rows of several documents each, and the documents."""
    documents = rows()["input_ids"][:]
    groups = [documents[i : i + per_row] for i in range(0, len(documents), per_row)]
    data = {
        "input_ids": [[x for document in group for x in document] for group in groups],
        "position_ids": [[i for document in group for i in range(len(document))] for group in groups],
        "labels": [[-100 if i == 0 else x for document in group for i, x in enumerate(document)] for group in groups],
    }
    return Dataset.from_dict(data), groups


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(_tiny.config("gpt2", 2)).eval()


@pytest.mark.parametrize("make", [causal, masked, gpt2])
def test_each_document_is_read_by_itself(tmp_path: Path, make: Any) -> None:
    teacher, (data, groups) = make(), packed()
    found = read_cache(write(tmp_path / "cache", teacher, dataset=data, top_k=60, hidden=[0, 2]))
    assert found.column_names[:3] == ["input_ids", "position_ids", "labels"]
    for row, cached, group in zip(data, found, groups, strict=True):
        assert {name: cached[name].tolist() for name in row} == row
        parts = [distribution(teacher, {"input_ids": document}, (0, 2)) for document in group]
        truth = torch.cat([logp for logp, _ in parts])
        assert (torch.tensor(cached["topk_indices"]) == torch.arange(60)).all()
        assert is_rounded(torch.tensor(cached["topk_logprobs"]), truth)
        for i, state in zip((0, 2), zip(*(states for _, states in parts), strict=True), strict=True):
            torch.testing.assert_close(torch.tensor(cached[f"hidden_{i}"]), torch.cat(state), rtol=2e-3, atol=1e-3)
        across, _ = distribution(teacher, row)
        assert not is_rounded(torch.tensor(cached["topk_logprobs"]), across)  # reading across would be seen


def test_only_documents_must_fit_the_teacher(tmp_path: Path) -> None:
    data, groups = packed()
    longest = max(len(document) for group in groups for document in group)
    write(tmp_path / "cache", causal(max_position_embeddings=longest), dataset=data, top_k=2)
    with pytest.raises(ValueError, match=rf"row \d has {longest} tokens; the teacher takes {longest - 1}"):
        write(tmp_path / "other", causal(max_position_embeddings=longest - 1), dataset=data, top_k=2)


def test_positions_that_say_nothing_of_documents(tmp_path: Path) -> None:
    data, _ = packed()
    late = data.map(lambda row: {"position_ids": [i + 1 for i in row["position_ids"]]})
    with pytest.raises(ValueError, match="row 0: position_ids go on at 1; they should count from 0 in each document"):
        write(tmp_path / "cache", dataset=late, top_k=2)
    short = data.map(lambda row, i: {"position_ids": row["position_ids"][i > 1 :]}, with_indices=True)
    with pytest.raises(ValueError, match=r"row 2: position_ids has not one entry for each of its \d+ input_ids"):
        write(tmp_path / "cache", dataset=short, top_k=2)
    assert not list(tmp_path.glob("cache*"))
