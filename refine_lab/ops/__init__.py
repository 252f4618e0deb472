"""Tensor operations below the models; the tests compare each with its plain definition."""
