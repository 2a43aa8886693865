"""Packing: concatenated documents, targets shifted by one, padding as a separate document."""

import pytest
import torch

from phimini.parallel.training.batch import Document, next_token_targets, pack


def document(tokens: list[int], **fields) -> Document:
    return Document(tokens=tokens, targets=[t + 1 for t in tokens], **fields)


def test_documents_lie_end_to_end() -> None:
    batch = pack([document([1, 2, 3]), document([4]), document([5, 6])])
    assert batch.tokens_T.tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.targets_T.tolist() == [2, 3, 4, 5, 6, 7]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6] and batch.cu_seqlens.dtype == torch.int32
    assert batch.lengths == [3, 1, 2] and batch.num_documents == 3 and batch.num_tokens == 6
    assert batch.document_ids_T.tolist() == [0, 0, 0, 1, 2, 2]
    assert batch.names == () and batch.fields == {}


def test_the_tail_is_a_dummy_document() -> None:
    first = document([1, 2], token_fields={"w": [0.5, 0.25]}, document_fields={"id": 7}, name="a:1")
    second = document([3], token_fields={"w": [1.0]}, document_fields={"id": 8}, name="a:2")
    batch = pack([first, second], multiple_of=4)
    assert batch.tokens_T.tolist() == [1, 2, 3, 0]
    assert batch.targets_T.tolist() == [2, 3, 4, -100]
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 4]
    assert batch.fields["w"].tolist() == [0.5, 0.25, 1.0, 0.0]
    assert (
        batch.document_fields["id"].tolist() == [7, 8, 0]
        and batch.document_fields["id"].dtype == torch.int64
    )
    assert batch.names == ("a:1", "a:2")
    assert pack([first, second], multiple_of=3).num_documents == 2


def test_targets_are_the_next_trained_tokens() -> None:
    assert next_token_targets([5, 6, 7, 8], [True, False, True, True]) == [-100, 7, 8, -100]
    assert next_token_targets([5], [True]) == [-100]
    with pytest.raises(ValueError, match="2 tokens but 1 loss flags"):
        next_token_targets([1, 2], [True])


@pytest.mark.parametrize(
    ("documents", "says"),
    [
        ([], "at least one document"),
        ([document([1]), document([])], "document 1 has no tokens"),
        ([Document(tokens=[1, 2], targets=[1])], "document 0 has 2 tokens but 1 targets"),
        ([document([1, 2], token_fields={"w": [1.0]})], "2 tokens but 1 w"),
        ([document([1]), document([1], token_fields={"w": [1.0]})], r"document 1 has token fields \['w'\], the first \[\]"),
        ([document([1], document_fields={"a": 1}), document([1])], r"document 1 has document fields \[\]"),
    ],
    ids=["none", "empty", "targets", "field-length", "token-fields", "document-fields"],
)  # fmt: skip
def test_bad_documents_are_refused(documents: list[Document], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        pack(documents)
