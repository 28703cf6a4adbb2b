"""Evaluation: MTEB and local folders, statistics on the scores, what each layer holds, plots."""
