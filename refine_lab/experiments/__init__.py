"""What a notebook runs: configurations of methods and seeds, their runs, what came of them, and how long it takes.

`configs` builds the configurations of every phase and `tasks` chooses their prompts; `runs` makes run directories; `midtrain`,
`posttrain` and `ttt` hold what one phase's notebook calls besides; `compare` sets methods beside each other; `estimate`
times a phase; `parameters` reads a notebook's parameters.
"""
