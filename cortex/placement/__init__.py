"""Where models go, what is evicted for them, and when. Pure: an immutable `View` in, plans and steps out.
`cortex.control` and `cortex.simulator` call it; `explain` calls the same functions."""
