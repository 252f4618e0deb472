"""Run directories and the processes that write them, the same for training and for test-time training.

`run` reads a directory, `writer` writes one, `files` implements how each file is written and truncated, `answers`
stores answers, and `schema` specifies the columns of rollouts. `process` starts, follows and stops a child process,
whose own code is in `child`; `queue` executes runs one after another. `environment` records what a run was made with.
"""
