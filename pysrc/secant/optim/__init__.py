"""torch.optim.Optimizer classes, one file each."""
