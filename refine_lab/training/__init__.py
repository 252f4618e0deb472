"""The process that trains a model, or adapts it to prompts and answers them: `python -m refine_lab.training RUN_DIR`."""
