"""OpenTelemetry traces of requests. Only `opening` may be imported without the packages of `cortex-neuron[tracing]`."""
