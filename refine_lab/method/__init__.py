"""The method in the order of its steps (paper, section 3): selection, rollout, rewards, advantages, losses, step."""
