"""Costs of training: counted before a run on tensors without values, and measured on this machine."""
