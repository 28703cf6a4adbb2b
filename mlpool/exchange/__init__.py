"""To other tools and back: plain folders, torch.export files, vLLM, the authors' folders."""

FORMATS = ("st", "torch", "vllm")  # of `mlpool export`: a plain folder, one file, a folder for our plugin of vLLM
