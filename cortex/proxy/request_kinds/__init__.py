"""Request handlers for requests whose engine is not simply that of the `model` in their body: WebSockets, stored
responses, forms on disk. The gateway creates them."""
