"""What the tests work with: pages, notebooks, the plain procedure, texts that attack."""
