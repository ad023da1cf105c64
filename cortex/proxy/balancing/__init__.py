"""Which replica gets a request: outstanding work, measured speed, prefix affinity. Called by the request
handler; `cortex.control` weighs waiting requests by the same rule."""
