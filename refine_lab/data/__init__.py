"""Documents and batches: sources of text, the tokenizer, packed tokens, recall documents, and batches by step."""
