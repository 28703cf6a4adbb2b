"""To other tools and back: plain folders, torch.export files, the authors' folders."""

FORMATS = ("st", "torch")  # of `mlpool export`: a plain folder, one file
