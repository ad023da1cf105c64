"""What a client gets: an engine's answer passed on, the signs of life before and in it, and cortex's own answers and
errors. The request handlers of `cortex.proxy` use it; it knows none of them."""
