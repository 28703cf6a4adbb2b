"""What stands in the layers: correlation, scores, what a pool reads, plots."""
