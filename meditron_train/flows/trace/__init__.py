"""The real training step on a GPU that is pretended: what it will hold, send and wait for, known without one.

`device.py` is the GPU, `recorder.py` watches it with `ledger.py` for the memory, `rank.py` takes a rank's step on it,
and `coverage.py` asks all ranks who owns what. `trace.py` starts a process for each, and `findings.py` judges what they
saw by what `expected.py` and `ownership.py` say. `trace.py` and all that it imports by itself are free of torch.
"""
