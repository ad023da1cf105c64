"""Renders the chart with Helm and checks what comes out against the schemas of Kubernetes. Runs in the environment of
tests/environment/helm.py: `render.py CHART` reads a list of values from standard input as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import helm_python
import kubernetes_validate
import yaml

KUBERNETES = ("1.29", "1.37")
"""The oldest and the newest that the chart is checked for."""
CUSTOM = "monitoring.coreos.com"
"""Resources of the Prometheus operator, for which there is no schema."""


def rendered(chart: Any, path: str, values: dict[str, Any]) -> dict[str, Any]:
    """`{"error"}`, or `{"objects", "problems"}`."""
    try:
        chart.validate_schema(values)
        manifests = chart.render(values, name="prod", namespace="gpu")
    except helm_python.HelmError as error:
        return {"error": str(error)}
    report = helm_python.lint(path, values, strict=True)
    problems = [message["error"] for message in report["messages"] if message["severity"] > 1]
    texts = [text for name, text in manifests.items() if name.endswith(".yaml")]
    objects = [each for text in texts for each in yaml.safe_load_all(text) if each]
    for each in objects:
        for version in KUBERNETES:
            if not each["apiVersion"].startswith(CUSTOM):
                try:
                    kubernetes_validate.validate(each, version, strict=True)
                except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
                    problems.append(f"{version} {each['kind']} {each['metadata']['name']}: {error}")
    return {"objects": objects, "problems": problems}


def main() -> None:
    path = sys.argv[1]
    chart = helm_python.Chart.load(path)
    print(json.dumps([rendered(chart, path, values) for values in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
