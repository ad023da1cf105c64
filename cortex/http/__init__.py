"""HTTP/1.1 as bytes: heads read by llhttp, framing, request bodies, clients' connections, the server. Knows nothing of
models or engines. `cortex.proxy` handles the requests; `cortex.upstream` reads answers with the same parsers."""
