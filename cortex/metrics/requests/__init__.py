"""The requests of this cortex, live and recent: kept by each worker for a while, merged in the control process when an
operator looks at them."""
