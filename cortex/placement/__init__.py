"""Where models go, which are evicted for them, and when. Pure: takes an immutable `PlanningView`, returns plans.
`cortex.control` and `cortex.simulator` call it; `explain` calls the same functions."""
