"""Routes that no engine answers: the model list, the fleet and operator actions, health and metrics. Only `cortex.app`
mounts them; handlers reach everything else through `app_keys`."""
