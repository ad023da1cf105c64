"""What cortex asks loaded engines itself: their context length and their metrics. `cortex.app` constructs the owners,
handlers find them under their app keys."""
