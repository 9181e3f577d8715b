"""Arrays on devices: held without a wait, read all at once, and what accumulators hold."""
