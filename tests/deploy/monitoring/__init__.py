"""deploy/prometheus and deploy/grafana: only metrics and labels that exist, and alerts that fire."""
