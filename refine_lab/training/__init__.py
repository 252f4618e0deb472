"""Training and test-time training: optimizers, the loops over steps and prompts, evaluation, and the process of a run."""
