"""Prompts with answers: where they come from, whether their splits share anything, how they are answered and scored."""
