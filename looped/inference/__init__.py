"""How a trained model is run at a depth: a rollout for each way (loop, solver, unmasking, a rule's own), and texts."""
