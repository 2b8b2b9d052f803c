"""Running a trained model at a depth: a rollout for each way (loop, solver, unmasking, a rule's own), and texts."""
