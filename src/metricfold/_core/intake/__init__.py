"""Where metrics come in: the aggregator's calls and what holds them until the next reduction."""
