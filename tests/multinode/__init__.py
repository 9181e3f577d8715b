"""Two hosts on one machine, each with a network of its own, and jobs that `torchrun` starts on both."""
