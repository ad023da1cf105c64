"""HTTP/1.1 on the client side: heads read by llhttp, framing, request bodies, connections, the server. Knows nothing of
models or engines; `cortex.proxy` handles what it reads."""
