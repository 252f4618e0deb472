"""Documents and batches: sources of text, the tokenizer, packed tokens, facts to recall, batches by step."""
