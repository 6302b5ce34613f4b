"""Cases, tolerances and timers that tests and benches share."""
