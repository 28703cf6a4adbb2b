"""To other tools and back: plain folders, torch.export files, the authors' folders."""
