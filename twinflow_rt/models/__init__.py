"""One velocity network per model family."""
