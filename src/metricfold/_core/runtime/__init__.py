"""What is around a call: frameworks, traces, recomputation, copies, threads, exits and forks."""
