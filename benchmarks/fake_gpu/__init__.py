"""One step of a published configuration on a CUDA device that does not exist: `python -m benchmarks.fake_gpu --json FILE`.

Tensors have shapes, dtypes and a device, but no data (torch's FakeTensorMode), so that the CUDA path runs on a laptop.
What it launches, moves, keeps in memory and waits for is counted; its time is estimated. `docs/gpu.md` says how to read it.

    device      makes torch's CPU build and Triton believe in one H200; before torch is imported
    values      the values of lengths, positions and other small integers, which decide what is computed next
    sources     the line and the phase of the step in which an operation runs
    ledger      what is in memory, and what the peak consists of
    roofline    the estimated time of every launch
    watch       the mode through which every operation passes
    phases      the steps: mid-training, post-training, test-time training, evaluation, reading in the explorer
    workers     the weights divided among several workers, and what these exchange
    report      the figures of a run, and the best micro-batch
"""
