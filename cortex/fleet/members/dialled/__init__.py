"""The connections that neurons with `dial = "out"` keep to cortex. The broker, which cortex starts as
`python -m cortex.fleet.members.dialled`, has them and passes bytes; `broker_process` is the control's side of it."""
