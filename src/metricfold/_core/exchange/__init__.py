"""The acts of a reduction, over whatever connects the ranks: exchange, reduce, one call at a time."""
