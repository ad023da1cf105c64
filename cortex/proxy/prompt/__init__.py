"""How long the prompt of a request is, and the refusal of one that cannot fit; called by `cortex.proxy.context`."""
