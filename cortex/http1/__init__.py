"""HTTP/1.1 as bytes: heads read by llhttp, bodies followed by counting."""
