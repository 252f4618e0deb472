"""The method, one module per step (paper, section 3): selection, rollout, rewards, advantages, losses, step."""
