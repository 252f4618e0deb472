"""Models, configurations, batches and runs that the tests of several modules share."""
