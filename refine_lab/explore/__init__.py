"""Interactive exploration of a model: how it reads a document, what it rolls out at any position, and how it adapts.

`reading` and `rollouts` are the functions, `session` caches models and documents so that nothing is read twice,
`worker` is the process that holds a session, and `client` is the notebook's connection to it, which does not load torch.
"""
