"""Fine-tuning on GLUE and on tasks like it: `glue.py` at the root."""
