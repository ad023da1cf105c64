"""Which metrics and labels a PromQL expression uses, and whether they exist."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from typing import Any

import promql_parser as promql

Metrics = Mapping[str, Set[str]]
"""The labels of each metric, by the name of its samples."""


class UnknownName(Exception):
    """The expression uses a metric or a label that does not exist."""


def labels_of(text: str, metrics: Metrics) -> set[str]:
    """The labels of an expression's result. Grafana's variables count as values.

    Raises:
        UnknownName: a metric, or a label of it, is not in `metrics`.
        ValueError: not PromQL.
    """
    return _labels(promql.parse(re.sub(r"\$__\w+", "5m", text)), metrics)


def _labels(node: Any, metrics: Metrics) -> set[str]:
    found: set[str]
    match node:
        case promql.VectorSelector():
            found = _of_selector(node, metrics)
        case promql.MatrixSelector():
            found = _labels(node.vector_selector, metrics)
        case promql.ParenExpr() | promql.UnaryExpr() | promql.SubqueryExpr():
            found = _labels(node.expr, metrics)
        case promql.NumberLiteral() | promql.StringLiteral():
            found = set()
        case promql.Call():
            found = set().union(*(_labels(each, metrics) for each in node.args))
            found -= {"le"} if node.func.name == "histogram_quantile" else set()
        case promql.AggregateExpr():
            found = _of_aggregate(node, metrics)
        case promql.BinaryExpr():
            found = _of_binary(node, metrics)
        case _:
            raise NotImplementedError(type(node))
    return found


def _of_selector(node: Any, metrics: Metrics) -> set[str]:
    if node.name not in metrics:
        raise UnknownName(f"metric {node.name}")
    labels = set(metrics[node.name])
    _known([matcher.name for matcher in node.matchers.matchers], labels, node.name)
    return labels


def _of_aggregate(node: Any, metrics: Metrics) -> set[str]:
    inner = _labels(node.expr, metrics)
    if node.modifier is None:
        return set()
    _known(node.modifier.labels, inner, str(node))
    named = set(node.modifier.labels)
    return inner & named if node.modifier.type == promql.AggModifierType.By else inner - named


def _of_binary(node: Any, metrics: Metrics) -> set[str]:
    left, right = _labels(node.lhs, metrics), _labels(node.rhs, metrics)
    matching = None if node.modifier is None else node.modifier.matching
    if matching is not None:
        for side in (left, right):
            _known(matching.labels, side, str(node))
    scalar = isinstance(node.rhs, promql.NumberLiteral | promql.BinaryExpr) and not right
    if matching is None or scalar or str(node.op) in ("and", "or", "unless"):
        return left
    return set(matching.labels)


def _known(names: list[str], labels: Set[str], where: str) -> None:
    for name in names:
        if name not in labels:
            raise UnknownName(f"label {name} in {where}, which has {sorted(labels)}")


def templated(text: str) -> list[str]:
    """The labels that a legend (`{{node}}`) or an annotation (`{{ $labels.node }}`) names."""
    return re.findall(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}", text)
