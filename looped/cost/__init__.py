"""Cost of training: counted before a run on fake tensors, and measured on this machine."""
