"""To other tools and back: plain folders, torch.export files, ONNX, the authors' folders."""

FORMATS = ("st", "torch", "onnx")  # of `mlpool export`: a plain folder, one file, a folder for ONNX Runtime
