"""Inference of a trained model at a depth: rollouts (loop, solver, unmasking, a rule's own), and text generation."""
