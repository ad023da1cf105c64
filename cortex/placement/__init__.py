"""Where models go, which are evicted for them, and when. Pure: takes an immutable `View`, returns plans and steps.
`cortex.control` and `cortex.simulator` call it; `explain` calls the same functions."""
