"""Networks as programs: traced, compared, followed example by example; integers as signals."""
