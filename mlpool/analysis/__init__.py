"""What stands in the layers: correlation, scores, what a pool reads, plots."""

POOLINGS = ("last", "mean", "unit_mean")  # of tokens, as `mlpool.gather` knows them
WINDOW = 512  # texts in memory at once, by default
FEWEST = 4  # texts in a window: unbiased HSIC is not defined below
