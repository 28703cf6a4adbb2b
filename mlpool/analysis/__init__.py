"""What stands in the layers: correlation, scores, what a pool reads, plots."""

WINDOW = 512  # texts in memory at once, by default
FEWEST = 4  # texts in a window: unbiased HSIC is not defined below
