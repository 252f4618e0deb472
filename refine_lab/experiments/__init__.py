"""Functions that notebooks call: configurations of methods and seeds, their runs, results, and time estimates.

`configs` builds the configurations of every phase and `tasks` chooses their prompts; `runs` creates run directories;
`midtrain`, `posttrain` and `ttt` hold functions for one phase's notebook; `compare` compares methods; `estimate`
estimates a phase's duration; `parameters` reads a notebook's parameters.
"""
