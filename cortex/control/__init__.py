"""Decides and acts: resolves a model to an engine, queues requests that wait, schedules loads and evictions and carries
them out. One control runs per cortex; workers reach it through `Control`, operators through `cortex.api`."""
