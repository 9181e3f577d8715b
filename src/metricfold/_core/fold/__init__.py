"""How values combine: states and their merges, what is built in, and the user's own handlers."""
