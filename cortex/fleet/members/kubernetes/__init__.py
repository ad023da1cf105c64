"""Finds neurons by the labels of their pods, through the API of the Kubernetes cluster that cortex runs in.
`cortex.fleet.members.opening` starts it."""
