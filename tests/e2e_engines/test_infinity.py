"""A real infinity through the fleet: embeddings are in test_one_fleet."""

from __future__ import annotations

import pytest

from tests.e2e_engines.fleet import RERANKER
from tests.services import Fleet

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


def test_documents_are_ranked(fleet: Fleet) -> None:
    """Cold; the second request finds the engine."""
    documents = ["a cat", "hello world", "dogs are"]
    for _ in range(2):
        answer = fleet.cortex.request("/v1/rerank", {"model": RERANKER, "query": "hello", "documents": documents})
        assert answer.status == 200, f"{answer.body}\n{fleet.neuron.log_tail()}"
        scores = [result["relevance_score"] for result in answer.body["results"]]
        assert sorted(result["index"] for result in answer.body["results"]) == [0, 1, 2]
        assert scores == sorted(scores, reverse=True)
        assert len(set(scores)) == 3


def test_a_path_that_it_lacks_is_not_found(fleet: Fleet) -> None:
    body = {"model": RERANKER, "messages": [{"role": "user", "content": "Hi"}]}
    assert fleet.cortex.request("/v1/chat/completions", body).status == 404
