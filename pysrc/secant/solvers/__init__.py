"""Line searches and the other inner solvers of the optimizers."""
