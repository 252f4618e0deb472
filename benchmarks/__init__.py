"""What the method costs: `python -m benchmarks.<name> --model NAME --json FILE`."""
