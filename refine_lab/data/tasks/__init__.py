"""Tasks: prompts with answers, their sources, their splits, and how an answer is extracted and scored."""
