"""Models for where this project is not installed: Hugging Face folders with their own modelling file, and ONNX."""
