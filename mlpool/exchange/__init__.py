"""To other tools and back: plain folders, torch.export files, ONNX, vLLM, the authors' folders."""

# Of `mlpool export`: a plain folder, one file, a folder for ONNX Runtime, one for vLLM with our plugin.
FORMATS = ("st", "torch", "onnx", "vllm")
