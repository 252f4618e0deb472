"""Tensor operations below the models, each beside its plain definition in the tests."""
