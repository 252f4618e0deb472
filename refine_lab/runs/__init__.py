"""Run directories and the processes that write them, the same for training and for test-time training.

`run` reads a directory, `writer` writes one, `files` says how each file is written and cut back, `answers` keeps answers,
`schema` specifies the columns of rollouts.
`process` starts, follows and stops a child process, whose own side is `child`; `queue` takes runs in turn. `environment` says
what a run was made with.
"""
