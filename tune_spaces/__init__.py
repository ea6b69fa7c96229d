"""Search spaces as typed data over config keys."""
